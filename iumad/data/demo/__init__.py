"""The demo set: procedurally rendered RGB and depth pictures of six objects with six kinds of defects.

Everything comes from code, a seed, and three texture photographs inside scikit-image; nothing is downloaded.
"""

from iumad.data.demo.defects import DEFECT_KINDS
from iumad.data.demo.objects import OBJECTS
from iumad.data.demo.scene import Picture, render
from iumad.data.demo.writing import DemoConfig, cached_demo, write_demo

DEMO_CLASSES = tuple(OBJECTS)

__all__ = ["DEFECT_KINDS", "DEMO_CLASSES", "DemoConfig", "Picture", "cached_demo", "render", "write_demo"]
