"""The package is imported again after its removal from sys.modules, as by test runners and notebooks.

The operators, their fake kernels and the TorchBind classes stay in the process. A process of its own: every other test
holds objects of the first import.
"""

from __future__ import annotations

from pathlib import Path

from fresh import run_python

PROGRAM = """
import sys, torch, safetensors_torch as first

def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "safetensors_torch"]:
        del sys.modules[name]

path = sys.argv[1]
x = torch.arange(4.0)
first.save_file({"x": x}, path)
file = first.safe_open(path)
forget()
# An import that was interrupted after some fake kernels were registered.
def interrupted(*args, **kwargs):
    raise KeyboardInterrupt
torch.fx.node.has_side_effect, has_side_effect = interrupted, torch.fx.node.has_side_effect
try:
    import safetensors_torch
except KeyboardInterrupt:
    print("interrupted")
torch.fx.node.has_side_effect = has_side_effect
forget()
import safetensors_torch as again
assert again.load_file is not first.load_file
again.save_file({"x": x}, path)
for package in (first, again):
    assert torch.equal(package.load_file(path)["x"], x)
    assert torch.equal(package.load(package.save({"x": x}))["x"], x)
assert torch.equal(file.get_tensor("x"), x)
with again.safe_open(path) as opened:
    assert opened.get_slice("x")[1:3].tolist() == [1.0, 2.0]
model = torch.nn.Linear(2, 2)
again.save_model(model, path)
again.load_model(model, path)
with torch._subclasses.FakeTensorMode():
    assert again.load_file(path)["weight"].shape == (2, 2)
    try:
        torch.ops.safetensors_torch.get_tensor(path, "gone")
    except again.SafetensorError as error:
        print("the error of the last import:", "gone" in str(error))
with again.patch_safetensors():
    import safetensors.torch
    assert isinstance(safetensors.safe_open(path, "pt"), again.safe_open)
print("done")
"""


def test_the_package_can_be_imported_again(tmp_path: Path) -> None:
    result = run_python(PROGRAM, tmp_path / "file")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == ["interrupted", "the error of the last import: True", "done"]
