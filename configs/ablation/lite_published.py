# The published model, with which the other rows are compared.
_base_ = '../imagenet/rest_lite_8xb128_in1k.py'
