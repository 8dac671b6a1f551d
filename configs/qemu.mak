# SPDX-License-Identifier: GPL-2.0
#
# The devices of a QEMU for guests with private memory (scripts/build-qemu):
# those that give memory back, and a console, a disk and a way out; for scripts/regress, those that
# kvm-unit-tests want.
CONFIG_Q35=y
CONFIG_VIRTIO_PCI=y
CONFIG_VIRTIO_BALLOON=y
CONFIG_VIRTIO_MEM=y
CONFIG_VIRTIO_SERIAL=y
CONFIG_VIRTIO_BLK=y
CONFIG_ISA_DEBUG=y
CONFIG_ISA_TESTDEV=y
CONFIG_PCI_TESTDEV=y
