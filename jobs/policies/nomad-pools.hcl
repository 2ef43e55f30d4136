# What the control plane needs in Nomad for pools, in addition to nomad-reconciler.hcl.
# `nomad acl policy apply nomad-watchdog-pools nomad-pools.hcl`
namespace "default" {
  # scale-job: for the built-in scaler and `pools scale`. read-job: also for the resources that the workers use.
  capabilities = ["list-jobs", "read-job", "parse-job", "submit-job", "scale-job"]
}
