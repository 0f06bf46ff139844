"""diffusers' ``UNet2DConditionModel`` in stages, for every family that has one."""
