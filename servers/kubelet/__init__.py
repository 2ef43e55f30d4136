"""A substitute for a kubelet: runs pods as processes on this machine."""
