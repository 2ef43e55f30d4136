# The parent job of the agents: each device has one dispatched child of it.
# nomad-watchdog registers it, and sets the job ID and the installation.

variable "datacenters" {
  type        = string
  default     = "*"
  description = "Comma-separated names; globs are allowed."
}

variable "node_pool" {
  type    = string
  default = "default"
}

variable "driver" {
  type        = string
  default     = "raw_exec"
  description = "raw_exec, or exec if clients run as root."
}

variable "python" {
  type        = string
  default     = "python3"
  description = "Python interpreter on the client, 3.11 or later."
}

variable "agent_source" {
  type        = string
  default     = ""
  description = "URL of watchdog-agent.pyz (by default the API's); empty: the installed module."
}

variable "agent_checksum" {
  type        = string
  default     = ""
  description = "sha256:… of the file at agent_source (by default the API's file's). Nomad runs no other file."
}

variable "agent_path" {
  type        = string
  default     = ""
  description = "File on the client instead of an artifact; takes precedence over agent_source."
}

variable "isolated" {
  type        = bool
  default     = true
  description = "Ignore the client's Python variables and, with a file, its packages, which also saves memory. Set it to false if plugins need PYTHONPATH."
}

variable "token_file" {
  type        = string
  default     = ""
  description = "File on the client with the API token, if the API requires one."
}

variable "consul_token_file" {
  type        = string
  default     = ""
  description = "A file on the client with the agents' Consul token, if Consul requires one."
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
  type        = string
  default     = "1h"
  description = "Time after which the agent on an unreachable node counts as lost."
}

variable "replace_lost" {
  type        = bool
  default     = false
  description = "Replace an agent on an unreachable node: false = rather no agent than two, true = rather two than none."
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

    # A moved agent starts when the old one has ended, whatever is set here. Do not set `migrate`: if an allocation
    # must fetch its disk from a purged node, its new client never learns of it, and it stays pending.
    ephemeral_disk {
      size   = 20
      sticky = true
    }

    network {
      port "http" {}
    }

    task "agent" {
      driver       = var.driver
      kill_timeout = var.kill_timeout

      config {
        command = var.python
        # In both cases no code in the working directory is run.
        args = concat(
          [var.isolated ? "-I" : "-P"],
          var.agent_path == "" && var.agent_source == "" ? ["-m", "watchdog_agent"] : concat(
            var.isolated ? ["-S"] : [],
            [var.agent_path != "" ? var.agent_path : "$${NOMAD_TASK_DIR}/watchdog-agent.pyz"]
          )
        )
      }

      env {
        WATCHDOG_CONFIG        = "$${NOMAD_TASK_DIR}/device.json"
        WATCHDOG_TOKEN_FILE    = var.token_file
        CONSUL_HTTP_ADDR       = var.consul_addr
        CONSUL_HTTP_TOKEN_FILE = var.consul_token_file
      }

      dynamic "artifact" {
        for_each = var.agent_source == "" || var.agent_path != "" ? [] : [var.agent_source]
        content {
          source      = artifact.value
          destination = "local/watchdog-agent.pyz"
          mode        = "file"
          dynamic "options" {
            for_each = var.agent_checksum == "" ? [] : [var.agent_checksum]
            content {
              checksum = options.value
            }
          }
        }
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
