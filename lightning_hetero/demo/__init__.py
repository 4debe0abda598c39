"""`lightning-hetero demo`: land cover from Sentinel-2 on two devices of unequal speed, beside plain DDP."""
