"""Let torchvision import where its compiled operators cannot load.

A torchvision built against another torch fails while registering `torchvision::nms`; the
transforms need none of its operators, so declaring the two names is enough.
"""

try:
    import torch
except ImportError:
    pass
else:
    try:
        _library = torch.library.Library("torchvision", "DEF")
        _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        pass  # a matching build has declared them itself
