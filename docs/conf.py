"""The documentation site (`make docs`): pages are plain Markdown, all that a site adds is here."""

import re
import shutil
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.writers.html5 import HTML5Translator

import shuffle_batchnorm

# Where the project's files can be read, such as https://.../blob/main; "" until it has an address.
REPOSITORY = ""

# Title: page, without .md. A page that isn't here fails the build.
NAVIGATION = {
    "README": {
        "Get started": {
            "Quick start": "quick_start",
            "Do I need this?": "need",
            "How it works": "how_it_works",
        },
        "Use": {
            "Recipes": "recipes",
            "Integrations": "integrations/README",
            "The command line": "trainer",
            "Moving samples": "batch_shuffle",
            "torch.compile": "compile",
        },
        "Evidence": {
            "The leak": "leak",
            "The audit": "audit",
            "The comparison": "comparison",
            "The law": "law",
            "Speed": "speed",
            "Scale": "scale",
            "Stability": "stability",
        },
        "Reference": {
            "API": "api/README",
            "Design": "design",
            "Limits": "limits",
            "FAQ": "faq",
            "The seed project's check": "check",
            "History": "history",
        },
    },
    "integrations/README": {
        "": {
            "Lightning": "integrations/lightning",
            "timm": "integrations/timm",
            "lightly": "integrations/lightly",
            "FSDP": "integrations/fsdp",
            "Hugging Face": "integrations/huggingface",
        }
    },
    "api/README": {
        "": {
            "The layer": "api/layer",
            "Moving samples": "api/shuffle",
            "Measuring": "api/measuring",
            "Which ranks": "api/ranks",
            "For frameworks": "api/integrations",
        }
    },
}

project = html_title = "shuffle_batchnorm"
release = shuffle_batchnorm.__version__
root_doc = "README"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

myst_heading_anchors = 4  # as on code-hosting sites
smartquotes_action = "D"  # dashes alone: mode="reduce-overhead" in a title is code
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

default_role = "py:obj"  # `name` in a docstring is a link where there is such a name
napoleon_custom_sections = ["Communication", "Shape", "Source"]
napoleon_use_ivar = True
add_module_names = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
maximum_signature_line_length = 88

html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = html_show_copyright = html_show_sphinx = False

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def outside_links(text: str, page: Path, docs: Path) -> str:
    """A page whose links to what the site doesn't have lead to `REPOSITORY`.

    Until it has an address, Sphinx puts files that are linked on the site, and folders are named.
    """

    def replace(link: re.Match[str]) -> str:
        title, target, anchor = link[1], link[2], link[3] or ""
        path = (page.parent / target).resolve()
        is_page = path.suffix == ".md" and path.is_relative_to(docs)
        if is_page or not path.exists():  # a dead link fails the build
            return link[0]
        name = path.relative_to(docs.parent).as_posix()
        if REPOSITORY:
            return f"[{title}]({REPOSITORY}/{name}{anchor})"
        if path.is_file() and path.suffix != ".md":
            return link[0]
        return f"`{name}`" if name.endswith(title.strip("`/")) else f"{title} (`{name}`)"

    return LINK.sub(replace, text)


def read(app: Sphinx, page: str, content: list[str]) -> None:
    """Give a page its part of the navigation, and links that lead somewhere."""
    docs = Path(app.srcdir).resolve()
    content[0] = outside_links(content[0], docs / f"{page}.md", docs)
    for caption, pages in NAVIGATION.get(page, {}).items():
        lines = [f"{title} </{name}>" for title, name in pages.items()]
        head = ["", "```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), ""]
        content[0] += "\n".join([*head, *lines, "```", ""])


class NameLinks(SphinxTransform):
    """Makes a public name that a page shows as code a link to its documentation."""

    default_priority = 500

    def apply(self, **_: object) -> None:
        inside = nodes.reference, nodes.title, addnodes.pending_xref
        for code in list(self.document.findall(nodes.literal)):
            name = code.astext()
            if is_public(name) and not isinstance(code.parent, inside):
                link = addnodes.pending_xref(
                    refdomain="py", reftype="obj", reftarget=name, refdoc=self.env.docname
                )
                code.replace_self(link)
                link += code


def is_public(name: str) -> bool:
    """Whether a name is one of `shuffle_batchnorm`, or an attribute of one."""
    return name.split(".")[0] in shuffle_batchnorm.__all__


def find_name(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Look a public name up that the page's or docstring's own module doesn't have."""
    name = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not is_public(name):
        return None
    target = f"shuffle_batchnorm.{name}"
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)


def draw(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """A formula as MathML, which browsers draw without a script."""
    formula = tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block))
    translator.body.append(f'<span class="math">{formula}</span>')
    raise nodes.SkipNode


def finish(app: Sphinx, error: Exception | None) -> None:
    """Let a server find the home page."""
    if not error:
        shutil.copyfile(app.outdir / "README.html", app.outdir / "index.html")


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (draw, None), (draw, None))
    app.add_transform(NameLinks)
    app.connect("source-read", read)
    app.connect("missing-reference", find_name)
    app.connect("build-finished", finish)
