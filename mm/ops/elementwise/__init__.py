"""The elementwise operators of a Wan block: references, arithmetic by device, autograd."""
