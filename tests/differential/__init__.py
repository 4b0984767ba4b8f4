"""Random images, made by QEMU, on which imgloop and QEMU have to agree."""
