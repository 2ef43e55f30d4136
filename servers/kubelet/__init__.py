"""A stand-in for a kubelet: runs pods as processes of this machine."""
