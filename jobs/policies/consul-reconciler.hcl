# What the control plane needs of Consul. Give the key_prefix your own registry prefix.
# `consul acl policy create -name watchdog-reconciler -rules @consul-reconciler.hcl`

# The registry of devices and its sentinel.
key_prefix "nomad-watchdog/" {
  policy = "write"
}

# Health of the agents. Without the right to read nodes Consul answers an empty list.
service "device-watchdog-agent" {
  policy = "read"
}

node_prefix "" {
  policy = "read"
}

# The control planes announce themselves, with the check that their leases hang on.
service "nomad-watchdog-replica" {
  policy = "write"
}

# Leases are sessions; their rules go by the name of the node that they are made on.
session_prefix "" {
  policy = "write"
}
