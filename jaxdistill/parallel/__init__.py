"""Devices: the mesh, and which logical axis of an array lies on which mesh axis."""

from jaxdistill.parallel.mesh import MeshConfig, find_devices, make_mesh
from jaxdistill.parallel.rules import param_shardings, place_batch

__all__ = ["MeshConfig", "find_devices", "make_mesh", "param_shardings", "place_batch"]
