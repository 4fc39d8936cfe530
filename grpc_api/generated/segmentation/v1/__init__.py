"""Generated from protos/segmentation/v1 by `make proto`: do not edit."""
