# What a watchdog agent needs of Consul: to register itself; and, only where a class has `escalate` or
# `state = "consul"`, to elect one that tells for many, and to keep its small state.
# Every agent registers under the one service name, so any agent's token can change another agent's
# entry. That is why nothing here decides who is accepted: the registry's epoch does. Nor does the
# election: two that both believe to be elected tell the same under the same key.
#
# `consul acl policy create -name watchdog-agent -rules @consul-agent.hcl`
#
# Where a class has `escalate`, agents elect by sessions. Consul's rules for sessions go by node: name those where
# agents run, and no others, as write access to a node's sessions is enough to end every session there:
#
#   printf 'session "%s" { policy = "write" }\n' client-1 client-2 | cat consul-agent.hcl - |
#     consul acl policy create -name watchdog-agent -rules -
service "device-watchdog-agent" {
  policy = "write"
}

# With another `consul.prefix` these begin with that.
key_prefix "nomad-watchdog/anomalies/" {
  policy = "write"
}

key_prefix "nomad-watchdog/agent-state/" {
  policy = "write"
}

# For sinks of the kind consul_event without a token of their own.
event "watchdog-escalation" {
  policy = "write"
}
