# The control plane itself. Two of them stand ready; the lease on a shard says which one acts.
# The token comes from a Nomad variable that the job's workload identity may read:
# `nomad var put nomad/jobs/nomad-watchdog nomad_token=… consul_token=…`

variable "datacenters" {
  type    = string
  default = "*"
}

variable "driver" {
  type        = string
  default     = "docker"
  description = "docker or raw_exec."
}

variable "image" {
  type    = string
  default = "agntup/nomad-watchdog:0.1.0"
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

variable "count" {
  type    = number
  default = 2
}

job "nomad-watchdog" {
  type        = "service"
  datacenters = split(",", var.datacenters)

  group "control-plane" {
    count = var.count

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

    network {
      port "api" {}
    }

    ephemeral_disk {
      size = 50
    }

    task "nomad-watchdog" {
      driver       = var.driver
      kill_timeout = "20s"
      user         = var.driver == "docker" ? "65534:65534" : ""

      dynamic "config" {
        for_each = var.driver == "docker" ? [1] : []
        content {
          image           = var.image
          args            = ["--config", var.config, "serve"]
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
          args    = ["--config", var.config, "serve"]
        }
      }

      # the tokens, from a Nomad variable of this job's own path, never in the job
      template {
        destination = "secrets/tokens.env"
        env         = true
        data        = <<-EOT
          {{ with nomadVar "nomad/jobs/nomad-watchdog" }}
          NOMAD_TOKEN={{ .nomad_token }}
          CONSUL_HTTP_TOKEN={{ .consul_token }}
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
