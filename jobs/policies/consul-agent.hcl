# What a watchdog agent needs of Consul: to register itself, and nothing else.
# Every agent registers under the one service name, so any agent's token can change another agent's
# entry. That is why nothing here decides who is accepted: the registry's epoch does.
# `consul acl policy create -name watchdog-agent -rules @consul-agent.hcl`
service "device-watchdog-agent" {
  policy = "write"
}
