# The cheapest child there is, for a thousand of them: Nomad's mock driver, present in builds without
# the tag `release` only.
variable "cpu" { default = 1 }
variable "memory" { default = 10 }
variable "kill_timeout" { default = "1s" }
variable "pool" { default = "default" }
job "mock" {
  type        = "batch"
  datacenters = ["*"]
  node_pool   = var.pool
  parameterized {
    payload       = "required"
    meta_required = ["device_id", "slug", "epoch", "spec_hash", "agent_class", "shard"]
  }
  group "agent" {
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      unlimited      = true
      attempts       = 0
      delay          = "5s"
      delay_function = "constant"
    }
    max_client_disconnect = "1h"
    ephemeral_disk { size = 10 }
    task "agent" {
      driver       = "mock_driver"
      kill_timeout = var.kill_timeout
      config { run_for = "1h" }
      dispatch_payload { file = "device.json" }
      resources {
        cpu    = 1
        memory = 10
      }
      logs {
        disabled      = true
        max_files     = 1
        max_file_size = 5
      }
    }
  }
}
