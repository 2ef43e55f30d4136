# What the control plane needs of Consul, but for sessions. Give the key_prefix your own registry prefix.
#
# Leases are sessions. Consul's rules for sessions go by the node that a session is made on: that of the Consul
# agent that a replica talks to. Write access to a node's sessions is enough to end every session of that node, those
# of other programs too. So name the nodes where replicas run, and no others:
#
#   printf 'session "%s" { policy = "write" }\n' client-1 client-2 | cat consul-reconciler.hcl - |
#     consul acl policy create -name watchdog-reconciler -rules -

# Not granted on purpose: agent_prefix "" { policy = "read" }. Only `nomad-watchdog doctor` would use it, to show the
# version of Consul; without it that check says that the version is not shown, and passes.

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
