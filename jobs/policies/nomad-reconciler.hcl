# What the control plane needs of Nomad, in its own namespace, and the list of nodes.
# `nomad acl policy apply nomad-watchdog nomad-reconciler.hcl`
namespace "default" {
  # submit-job: the parent jobs, and stopping and purging children. From Nomad 1.11.2 on it may be
  # replaced by register-job, deregister-job and purge-job.
  capabilities = ["list-jobs", "read-job", "parse-job", "dispatch-job", "submit-job"]
}

# Which nodes are drained, and the exact version of the servers. Without it neither is reported.
node {
  policy = "read"
}
