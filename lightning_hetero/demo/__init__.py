"""`lightning-hetero demo`: land cover from Sentinel-2 on two devices of unequal speed, compared with plain DDP.

May import everything but `cli`, and TorchGeo, rasterio and matplotlib as well.
"""
