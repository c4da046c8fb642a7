"""`python_blocks`."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from shared_core.testing import python_blocks, run_blocks

PAGE = """# Title

```python
x = 1
```

```
not python
```
Text ```python inline``` text.

  ```python
  y = [
      2,
  ]
  ```

```python
raise ValueError("line 20")
```
```bash
ls
```
"""


def test_blocks_with_their_line_numbers(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    first, second, third = python_blocks(page)
    assert first == "\n\n\nx = 1\n"
    namespace: dict[str, object] = {}
    exec(compile(second, page, "exec"), namespace)
    assert namespace["y"] == [2]
    with pytest.raises(ValueError, match="line 20") as error:
        exec(compile(third, page, "exec"), {})
    last = traceback.extract_tb(error.value.__traceback__)[-1]
    assert (last.filename, last.lineno) == (str(page), 19)
    assert python_blocks(str(page)) == [first, second, third]


def test_blocks_run_as_one_module(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("```python\nx = 1\n```\n```python\ny = [x, __name__]\n```\n")
    found = run_blocks(page)
    assert (found["x"], found["y"]) == (1, [1, "readme"])
    assert run_blocks(page, at_least=2).keys() == found.keys()
    with pytest.raises(ValueError, match=r"README\.md has 2 python blocks, not 3"):
        run_blocks(page, at_least=3)


def test_refuses_pages_without_blocks(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("```bash\nls\n```\n")
    with pytest.raises(ValueError, match=r"README\.md has no python block"):
        python_blocks(page)
    page.write_text("```python\nx = 1\n")
    with pytest.raises(ValueError, match=r"a python block of .*README\.md is not closed"):
        python_blocks(page)
    with pytest.raises(FileNotFoundError):
        python_blocks(tmp_path / "other.md")
