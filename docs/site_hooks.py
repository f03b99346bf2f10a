"""What the site needs beside mkdocs: links into the repository, and roles of Sphinx."""

import re
from pathlib import Path

import griffe
from mkdocs.exceptions import PluginError

REPO = Path(__file__).resolve().parent.parent
# [text](../configs/...): a file of the repository that is no page of the site
LINK = re.compile(r'\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)\)')


def on_page_markdown(markdown, page, **kwargs):
    """Show links to files of the repository as text, and insist that they exist."""
    folder = Path(page.file.abs_src_path).parent

    def replace(link):
        path = (folder / link[2]).resolve()
        if path.is_relative_to(REPO / 'docs'):
            return link[0]
        if not path.exists():
            raise PluginError(f'{page.file.src_path}: {link[2]} does not exist')
        return f'`{path.relative_to(REPO).as_posix()}`'

    return LINK.sub(replace, markdown)


class PlainRoles(griffe.Extension):
    """Show ``:func:`name``` in a docstring as code."""

    def on_object(self, *, obj, **kwargs):
        """Change the docstring of one class, function or module."""
        if obj.docstring:
            text = re.sub(r':[a-z]+:`~?([^`]+)`', r'`\1`', obj.docstring.value)
            # griffe knows the section of Google's style by its plural alone
            obj.docstring.value = re.sub(
                r'^(\s*)Example:$', r'\1Examples:', text, flags=re.M
            )
