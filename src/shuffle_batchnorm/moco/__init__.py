"""Train MoCo without the leak, measure the leak, show the picture; needs the extra ``train``."""
