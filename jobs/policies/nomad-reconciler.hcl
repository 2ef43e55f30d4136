# What the control plane needs in Nomad: rights in its namespace, and to list nodes.
# `nomad acl policy apply nomad-watchdog nomad-reconciler.hcl`
namespace "default" {
  # submit-job: to register parent jobs, and to stop and purge children. From Nomad 1.11.2 on it can be
  # replaced by register-job, deregister-job and purge-job.
  capabilities = ["list-jobs", "read-job", "parse-job", "dispatch-job", "submit-job"]
}

# For the drained nodes and the exact version of the servers. Without it neither is reported, and
# a rebalance knows only nodes that have agents.
node {
  policy = "read"
}
