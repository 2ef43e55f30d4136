# What a watchdog agent needs in Consul: to register itself; and, only if a class has `escalate` or `state = "consul"`,
# to elect the agent that notifies for all, and to store its state.
# All agents register under one service name, so the token of any agent can change the entry of another. Therefore no
# data in Consul decides which agent is accepted: the epoch in the registry does. Two agents that both believe that they
# are elected send the same notification with the same key.
#
# `consul acl policy create -name watchdog-agent -rules @consul-agent.hcl`
#
# If a class has `escalate`, agents use sessions for the election. Consul's rules for sessions are per node. List only
# the nodes where agents run, because write access to the sessions of a node is enough to end every session there:
#
#   printf 'session "%s" { policy = "write" }\n' client-1 client-2 | cat consul-agent.hcl - |
#     consul acl policy create -name watchdog-agent -rules -
service "device-watchdog-agent" {
  policy = "write"
}

# With another `consul.prefix` these keys begin with that prefix.
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
