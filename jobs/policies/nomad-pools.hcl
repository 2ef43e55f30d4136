# What the control plane needs of Nomad for pools, beside nomad-reconciler.hcl.
# `nomad acl policy apply nomad-watchdog-pools nomad-pools.hcl`
namespace "default" {
  # scale-job: the built-in scaler and `pools scale`. read-job is for what the workers use, too.
  capabilities = ["list-jobs", "read-job", "parse-job", "submit-job", "scale-job"]
}
