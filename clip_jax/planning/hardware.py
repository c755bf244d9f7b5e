"""Memory and bandwidths of the devices that a run can be planned for.

Bandwidths are the makers' published ones, bytes a second in one direction.
"""

from typing import NamedTuple

from clip_jax.errors import UserError
from clip_jax.training.metrics import Peak, peak_flops

GB, TB = 1e9, 1e12
GBIT = 1e9 / 8


class Device(NamedTuple):
    """One kind of device, as it is sold in machines of several.

    Attributes:
      kind: its row in `metrics.PEAKS`.
      memory: the bytes of its memory.
      memory_bandwidth: bytes a second to its own memory.
      link_bandwidth: bytes a second to the devices of the same machine, over all links together.
      machine_devices: how many devices such links join.
      network_bandwidth: bytes a second to other machines, each device's share; None where nothing
        is published.
      source: the document that has these numbers.
    """

    kind: str
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    machine_devices: int
    network_bandwidth: float | None
    source: str

    def bandwidth(self, group: tuple[int, ...]) -> float:
        """Return the bytes a second that each device of this group sends, all of them at once.

        A ring through whole machines crosses from one to the next only once, over the network of
        every member there together: with all eight that is nearly the links' own bandwidth.
        """
        machine = group[0] // self.machine_devices
        members = sum(number // self.machine_devices == machine for number in group)
        if members == len(group) or self.network_bandwidth is None:
            return self.link_bandwidth
        return min(self.link_bandwidth, members * self.network_bandwidth)

    def peak(self, dtype: str) -> float:
        """Return the published dense matrix rate, FLOP/s.

        Raises:
          UserError: no rate is published for this dtype.
        """
        peak = peak_flops(self.kind, dtype)
        if peak is None:
            known = [name for name in Peak._fields if peak_flops(self.kind, name) is not None]
            raise UserError(
                f"no rate is published for {dtype} on {self.kind}, but for {' and '.join(known)}:"
                " set config.model.dtype, or --dtype of clip_jax.data.bench"
            )
        return peak


# NVLink's published bandwidths are sums of both directions, halved here; networks are those of the
# DGX machine of each kind. TPUs: Google Cloud's system architecture pages, a pod as one machine.
DEVICES = {
    "v100": Device(
        "V100-SXM2", 32 * GB, 0.9 * TB, 150 * GB, 8, 50 * GBIT, "V100 and DGX-1 datasheets"
    ),
    "a100-40gb": Device(
        "A100", 40 * GB, 1.555 * TB, 300 * GB, 8, 200 * GBIT, "A100 and DGX A100 datasheets"
    ),
    "a100": Device(
        "A100", 80 * GB, 2.039 * TB, 300 * GB, 8, 200 * GBIT, "A100 and DGX A100 datasheets"
    ),
    "h100": Device(
        "H100", 80 * GB, 3.35 * TB, 450 * GB, 8, 400 * GBIT, "H100 SXM and DGX H100 datasheets"
    ),
    "h200": Device(
        "H200", 141 * GB, 4.8 * TB, 450 * GB, 8, 400 * GBIT, "H200 SXM and DGX H200 datasheets"
    ),
    "b200": Device("B200", 180 * GB, 8 * TB, 900 * GB, 8, 400 * GBIT, "DGX B200 datasheet"),
    "tpu-v4": Device("TPU v4", 32 * GB, 1.2 * TB, 300 * GB, 4096, None, "Cloud TPU v4 page"),
    "tpu-v5e": Device("TPU v5e", 16 * GB, 0.819 * TB, 200 * GB, 256, None, "Cloud TPU v5e page"),
    "tpu-v5p": Device("TPU v5p", 95 * GB, 2.765 * TB, 600 * GB, 8960, None, "Cloud TPU v5p page"),
    "tpu-v6e": Device("TPU v6e", 32 * GB, 1.638 * TB, 400 * GB, 256, None, "Cloud TPU v6e page"),
}


def find_device(name: str) -> Device:
    """Return the device of this name in `DEVICES`; upper and lower case are alike.

    Raises:
      UserError: there is no such device.
    """
    if name.lower() not in DEVICES:
        raise UserError(f"--device {name!r} is not known; known are: {', '.join(DEVICES)}")
    return DEVICES[name.lower()]
