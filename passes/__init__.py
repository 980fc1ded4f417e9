"""The passes, one file each; `PASSES` maps the name that a spec uses to the class."""

from fxq.passes.calibrate_bootstrap import CalibrateBootstrap
from fxq.passes.calibrate_max import CalibrateMax
from fxq.passes.calibrate_mse import CalibrateMse
from fxq.passes.fuse_experts import FuseExperts
from fxq.passes.lower import Lower
from fxq.passes.quantize_experts import QuantizeExperts
from fxq.passes.quantize_kv import QuantizeKv
from fxq.passes.quantize_linears import QuantizeLinears
from fxq.passes.sync_groups import SyncGroups
from fxq.pipeline.base import Pass

PASSES: dict[str, type[Pass]] = {
    cls.name: cls
    for cls in (
        FuseExperts,
        QuantizeLinears,
        QuantizeExperts,
        QuantizeKv,
        SyncGroups,
        CalibrateMax,
        CalibrateBootstrap,
        CalibrateMse,
        Lower,
    )
}
