# The control plane, on the cluster that it manages.
#
# Once, before the first run:
#   nomad-watchdog --config nomad-watchdog.hcl init
#   nomad var put nomad/jobs/nomad-watchdog \
#     api_token=$(openssl rand -hex 32) agent_key=$(openssl rand -hex 32) \
#     nomad_token=… consul_token=…                       # the last two if ACLs are enabled
#   nomad job run -var config=/etc/nomad-watchdog/nomad-watchdog.hcl nomad-watchdog.nomad.hcl
# The policies that the tokens need are in policies/.

variable "datacenters" {
  type        = string
  default     = "*"
  description = "Comma-separated names; globs are allowed."
}

variable "driver" {
  type        = string
  default     = "raw_exec"
  description = "raw_exec or docker."
}

variable "image" {
  type        = string
  default     = "agntup/nomad-watchdog:0.1.0"
  description = "docker only. Use a fixed version, or better a digest."
}

variable "command" {
  type        = string
  default     = "nomad-watchdog"
  description = "raw_exec only: the installed program."
}

variable "config" {
  type        = string
  default     = "/etc/nomad-watchdog/nomad-watchdog.hcl"
  description = "The configuration file, on the client or in the image."
}

variable "replicas" {
  type        = number
  default     = 1
  description = "Number of control planes, each on its own client. They share the work by leases in Consul."
}

variable "port" {
  type        = number
  default     = 9670
  description = "Port of the API. It is fixed, because running agents report to it."
}

variable "advertise" {
  type        = string
  default     = ""
  description = "URL at which agents and devices reach the API. Empty: the node's address and the port."
}

variable "door" {
  type        = string
  default     = "variable"
  description = "Authentication of the API: variable (the token in the Nomad variable), config (as configured), open (none)."
}

locals {
  # A process inherits the client's environment, from which no code must be loaded.
  unset = { for name in var.driver == "docker" ? [] : ["PYTHONPATH", "PYTHONHOME"] : name => "" }
}

job "nomad-watchdog" {
  type        = "service"
  datacenters = split(",", var.datacenters)

  group "control-plane" {
    count = var.replicas

    constraint {
      operator = "distinct_hosts"
      value    = "true"
    }

    restart {
      attempts = 3
      interval = "5m"
      delay    = "5s"
      mode     = "fail"
    }

    reschedule {
      unlimited      = true
      delay          = "5s"
      delay_function = "exponential"
      max_delay      = "1m"
    }

    network {
      port "api" {
        static = var.port
      }
    }

    # The events, and the agent files of earlier versions. They survive an update on the same node.
    ephemeral_disk {
      size   = 300
      sticky = true
    }

    service {
      name = "nomad-watchdog"
      port = "api"

      check {
        type     = "http"
        path     = "/ready"
        interval = "5s"
        timeout  = "2s"
      }
    }

    task "nomad-watchdog" {
      driver       = var.driver
      kill_timeout = "20s"
      user         = var.driver == "docker" ? "65534:65534" : ""

      dynamic "config" {
        for_each = var.driver == "docker" ? [1] : []
        content {
          image           = var.image
          args            = ["--config", var.config, "run"]
          network_mode    = "host"
          readonly_rootfs = true
          cap_drop        = ["all"]
          security_opt    = ["no-new-privileges"]
        }
      }

      dynamic "config" {
        for_each = var.driver == "docker" ? [] : [1]
        content {
          command = var.command
          args    = ["--config", var.config, "run"]
        }
      }

      env = merge(local.unset, {
        PYTHONSAFEPATH               = "1"
        NOMAD_WATCHDOG_BACKEND       = "nomad"
        NOMAD_WATCHDOG_DATA_DIR      = "$${NOMAD_ALLOC_DIR}/data"
        NOMAD_WATCHDOG_API_LISTEN    = "0.0.0.0:${var.port}"
        NOMAD_WATCHDOG_API_ADVERTISE = var.advertise != "" ? var.advertise : "http://$${NOMAD_ADDR_api}"
        NOMAD_WATCHDOG_API_OPEN      = var.door == "open" ? "true" : ""

        NOMAD_WATCHDOG_API_TOKEN_FILE     = var.door == "variable" ? "$${NOMAD_SECRETS_DIR}/api.token" : ""
        NOMAD_WATCHDOG_API_AGENT_KEY_FILE = var.door == "variable" ? "$${NOMAD_SECRETS_DIR}/agent.keys" : ""
      })

      # The tokens come from a Nomad variable of this job, and are not in the job itself.
      template {
        destination = "secrets/tokens.env"
        env         = true
        data        = <<-EOT
          {{ if nomadVarExists "nomad/jobs/nomad-watchdog" -}}
          {{ with nomadVar "nomad/jobs/nomad-watchdog" -}}
          {{ with .nomad_token }}NOMAD_TOKEN={{ . }}{{ end }}
          {{ with .consul_token }}CONSUL_HTTP_TOKEN={{ . }}{{ end }}
          {{ end }}{{ end }}
        EOT
      }

      # Reread when they change, without a restart.
      template {
        destination = "secrets/api.token"
        change_mode = "noop"
        data        = <<-EOT
          {{ if nomadVarExists "nomad/jobs/nomad-watchdog" -}}
          {{ with nomadVar "nomad/jobs/nomad-watchdog" }}{{ with .api_token }}{{ . }}{{ end }}{{ end }}
          {{ end }}
        EOT
      }

      template {
        destination = "secrets/agent.keys"
        change_mode = "noop"
        data        = <<-EOT
          {{ if nomadVarExists "nomad/jobs/nomad-watchdog" -}}
          {{ with nomadVar "nomad/jobs/nomad-watchdog" }}{{ with .agent_key }}{{ . }}{{ end }}{{ end }}
          {{ end }}
        EOT
      }

      resources {
        cpu    = 200
        memory = 256
      }

      logs {
        max_files     = 2
        max_file_size = 10
      }
    }
  }
}
