# SPDX-License-Identifier: GPL-2.0
#
# The devices of a QEMU that emulates the test machine (scripts/build-qemu lab):
# those of scripts/boot. Without an HPET its kernel cannot tell how fast the TSC
# is.
CONFIG_Q35=y
CONFIG_HPET=y
CONFIG_VIRTIO_PCI=y
CONFIG_VIRTIO_SERIAL=y
CONFIG_VIRTIO_BLK=y
