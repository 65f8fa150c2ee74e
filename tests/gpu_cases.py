"""Which cases `make gpu-test` runs of a test that has many.

Triton's interpreter runs them all. A GPU's compiler takes 0.2 to 1 s for each new kind of
arguments, so `gpu-test` has each dtype, layout, alignment, with splits or without, with groups or
without, once or twice, and not their products. The others get the mark `spare`; a test that has no
entry runs whole.
"""

from fnmatch import fnmatchcase

import pytest

# name of a test -> patterns of the parameters in brackets behind it
FEW: dict[str, tuple[str, ...]] = {
    # test_triton_launch.py
    "test_triton_is_the_reference": (
        "plain",
        "permuted*",
        "expanded over space*",
        "some channels channels-last",
        "empty blocks*",
        "constant*",
    ),
    "test_any_channels_and_any_length": ("(5, 13, 49)-True", "(5, 257, 9)-False", "(70, 1)*"),
    "test_any_sizes_of_blocks": ("*-sizes3",),
    "test_half_precision_is_summed_in_float32": ("contiguous-*bfloat16", "channels_last-*.float16"),
    "test_splits_add_up_and_repeat_their_bits": ("*-12",),
    "test_groups_are_made_of_their_blocks": ("(6, 5, 49)*-2", "(10, 5, 7, 1)*-1024"),
    "test_large_means_cancel_no_more_than_in_batch_norm": ("*-300.0-0.0-True", "run-0.0-3*-False"),
    "test_an_infinity_is_the_mean_of_its_channel": ("*-149-True",),
    "test_a_layer_on_triton_kernels": ("torch.float32-regroup", "torch.bfloat16-local"),
    # test_triton_local.py
    "test_groups_and_their_users": ("(10, 5, 7)-*", "(6, 5, 7, 7)-*-two"),
    "test_blocks_that_are_normalisers": ("swap-three", "local-two"),
    "test_what_a_step_moves": ("*float32-True*", "*bfloat16-False*-two"),
    "test_gradients_without_that_of_the_input": ("three",),
    "test_memory_at_odd_addresses_and_in_other_layouts": ("two",),
    # test_triton_merge.py
    "test_moments_of_parts": ("4",),
    "test_sums_of_parts": ("4",),
    # test_triton_ranks.py
    "test_rows_are_merged": ("2-*", "1024-torch.float32"),
}


def mark_spare(items: list[pytest.Item]) -> None:
    """Mark the cases that `gpu-test` leaves out."""
    for item in items:
        name, _, parameters = item.name.partition("[")
        patterns = FEW.get(name)
        if patterns and not any(fnmatchcase(parameters[:-1], pattern) for pattern in patterns):
            item.add_marker("spare")
