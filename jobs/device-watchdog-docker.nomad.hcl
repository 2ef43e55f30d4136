# As device-watchdog, but each agent runs in a container that can write only to its allocation.

variable "datacenters" {
  type    = string
  default = "*"
}

variable "node_pool" {
  type    = string
  default = "default"
}

variable "image" {
  type        = string
  default     = "agntup/watchdog-agent:0.1.0"
  description = "Use a fixed version, or better a digest."
}

variable "consul_token_file" {
  type        = string
  default     = ""
  description = "A file in the container with the agents' Consul token, if Consul requires one."
}

variable "consul_addr" {
  type        = string
  default     = ""
  description = "Address of the client's Consul agent, if it differs from the configuration, for example $${meta.…}."
}

variable "cpu" {
  type    = number
  default = 50
}

variable "memory" {
  type    = number
  default = 64
}

variable "kill_timeout" {
  type    = string
  default = "10s"
}

variable "restart_delay" {
  type    = string
  default = "2s"
}

variable "lost_after" {
  type    = string
  default = "1h"
}

variable "replace_lost" {
  type    = bool
  default = false
}

job "device-watchdog" {
  type        = "batch"
  datacenters = split(",", var.datacenters)
  node_pool   = var.node_pool

  parameterized {
    payload       = "required"
    meta_required = ["device_id", "slug", "epoch", "spec_hash", "agent_class", "shard"]
  }

  group "agent" {
    count = 1

    restart {
      attempts = 3
      interval = "5m"
      delay    = var.restart_delay
      mode     = "fail"
    }

    reschedule {
      attempts       = 0
      unlimited      = true
      delay          = "10s"
      delay_function = "exponential"
      max_delay      = "5m"
    }

    # Every Nomad accepts these two. If it supports the block `disconnect`, nomad-watchdog sets that block from them.
    max_client_disconnect = var.lost_after
    meta {
      replace_lost = var.replace_lost
    }

    # Do not set `migrate`: see device-watchdog.nomad.hcl.
    ephemeral_disk {
      size   = 20
      sticky = true
    }

    network {
      port "http" {}
    }

    task "agent" {
      driver       = "docker"
      kill_timeout = var.kill_timeout
      user         = "65534:65534"

      config {
        image           = var.image
        network_mode    = "host"
        readonly_rootfs = true
        cap_drop        = ["all"]
        security_opt    = ["no-new-privileges"]
        pids_limit      = 32
      }

      env {
        WATCHDOG_CONFIG        = "$${NOMAD_TASK_DIR}/device.json"
        WATCHDOG_LISTEN        = "$${NOMAD_IP_http}:$${NOMAD_PORT_http}" # over the image's
        CONSUL_HTTP_ADDR       = var.consul_addr
        CONSUL_HTTP_TOKEN_FILE = var.consul_token_file
      }

      dispatch_payload {
        file = "device.json"
      }

      resources {
        cpu    = var.cpu
        memory = var.memory
      }

      # Nomad requires that their size fits the disk even if they are disabled.
      logs {
        disabled      = true
        max_files     = 1
        max_file_size = 5
      }
    }
  }
}
