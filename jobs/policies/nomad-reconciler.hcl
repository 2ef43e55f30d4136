# What the control plane needs of Nomad, in its own namespace and nothing elsewhere.
# `nomad acl policy apply -namespace default nomad-watchdog nomad-reconciler.hcl`
namespace "default" {
  # submit-job: the parent jobs, and stopping and purging children. From Nomad 1.11.2 on it may be
  # replaced by register-job, deregister-job and purge-job.
  capabilities = ["list-jobs", "read-job", "parse-job", "dispatch-job", "submit-job"]
}
