# A worker pool, for an `agent_pool` without its own template. The control plane sets the job ID, the count and the
# scaling block; see docs/pools.md.

variable "pool" {
  type        = string
  description = "Name of the pool."
}

variable "command" {
  type        = string
  default     = "[]"
  description = "Program and arguments, as JSON."
}

variable "image" {
  type        = string
  default     = ""
  description = "Image of the workers. Empty: they are processes of the client."
}

variable "env" {
  type        = string
  default     = "{}"
  description = "Environment, as JSON."
}

variable "datacenters" {
  type        = string
  default     = "*"
  description = "Comma-separated names; globs are allowed."
}

variable "driver" {
  type        = string
  default     = ""
  description = "Task driver; empty: docker with an image, raw_exec without."
}

variable "cpu" {
  type    = string
  default = "100"
}

variable "memory" {
  type    = string
  default = "128"
}

variable "kill_timeout" {
  type    = string
  default = "30s"
}

locals {
  command = jsondecode(var.command)
  driver  = var.driver != "" ? var.driver : var.image != "" ? "docker" : "raw_exec"
}

job "pool-worker" {
  type        = "service"
  datacenters = split(",", var.datacenters)

  group "workers" {
    restart {
      attempts = 3
      interval = "1m"
      delay    = "2s"
      mode     = "delay"
    }

    reschedule {
      unlimited      = true
      delay          = "5s"
      delay_function = "exponential"
      max_delay      = "1m"
    }

    # Workers are replaced one at a time, and each is stopped first.
    update {
      max_parallel      = 1
      health_check      = "task_states"
      min_healthy_time  = "1s"
      healthy_deadline  = "1m"
      progress_deadline = "2m"
    }

    ephemeral_disk {
      size = 20
    }

    task "worker" {
      driver       = local.driver
      kill_timeout = var.kill_timeout

      dynamic "config" {
        for_each = var.image != "" ? [1] : []
        content {
          image = var.image
          args  = local.command
        }
      }

      dynamic "config" {
        for_each = var.image != "" ? [] : [1]
        content {
          command = local.command[0]
          args    = slice(local.command, 1, length(local.command))
        }
      }

      env = merge(jsondecode(var.env), {
        WORKER_POOL = var.pool
        WORKER_SLOT = "$${NOMAD_ALLOC_INDEX}"
      })

      resources {
        cpu    = var.cpu
        memory = var.memory
      }

      logs {
        max_files     = 2
        max_file_size = 5
      }
    }
  }
}
