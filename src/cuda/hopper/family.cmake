# The GPUs that this folder is compiled for.
set(SONICMOE_FAMILY_GENCODE -gencode=arch=compute_90a,code=sm_90a)
