"""The IB-IUMAD network. Files in the order of the data flow.

jitter          noise on the input features while training
mamba           the Mamba block around an ES2D selective scan
condition       image -> one condition map per encoder layer, class logits       (one per modality)
reconstruction  jittered features -> decoder outputs, modulated by the maps      (one per modality)
fusion          decoder outputs of all modalities -> F_fu
bottleneck      F_fu -> F_fu^g, class logits of both
discriminator   F_fu^g against the feature of the image -> anomaly map, score
ib_iumad        the assembly, its inputs and its `Output`

    model = build_model(config, num_classes=10, channels=backbone.channels)
    output = model({"rgb": rgb, "depth": depth}, {"rgb": backbone(rgb), "depth": backbone(depth)})
"""

from iumad.model.ib_iumad import IBIUMAD, Output, build_model

__all__ = ["IBIUMAD", "Output", "build_model"]
