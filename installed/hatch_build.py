"""What goes into a wheel: the checkout's programs in one folder, plain_rlhf/, and a .pth file beside it that puts the folder at
the end of Python's path. So `import rlhf` works, and the general names model and data hide nobody's.
"""

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOMS = ("data", "evaluation", "model", "presets", "rewards", "rlhf")


class OneFolder(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        if version == "editable":  # the checkout itself is on the path
            return
        root = Path(self.root)
        names = [*ROOMS, *(file.name for file in root.glob("*.py"))]
        build_data["force_include"] |= {str(root / name): f"plain_rlhf/{name}" for name in names}
        build_data["force_include"][str(root / "installed/plain_rlhf.pth")] = "plain_rlhf.pth"
