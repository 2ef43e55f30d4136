#!/usr/bin/env bash
# node.sh ROLE NAME ADDRESS
#
# Writes the configuration of Consul, Nomad and nomad-watchdog on one host. ROLE is server or client. Run it
# on that host, because it searches for the network interface of ADDRESS.
#
#   SECRETS   folder created by secrets.sh
#   SERVERS   addresses of the servers, separated by blanks
#   CLIENTS   addresses of the clients: where Prometheus finds the control planes
#   ETC       directory of the configuration      [/etc/nomad-watchdog-cluster]
#   DATA      data directory of Consul and Nomad  [/var/lib/nomad-watchdog-cluster]
#   PYTHON    interpreter for the agents          [python3]
set -euo pipefail
role=$1 name=$2 address=$3
etc=${ETC:-/etc/nomad-watchdog-cluster}
data=${DATA:-/var/lib/nomad-watchdog-cluster}
umask 077
mkdir -p "$etc" "$data"

secret() { cat "$SECRETS/$1"; }
list() { # "a", "b": an HCL list of the servers, each with a suffix
  for server in $SERVERS; do printf '"%s%s", ' "$server" "$1"; done
}

cp "$SECRETS/ca.pem" "$etc/ca.pem"
cp "$SECRETS/$name.pem" "$etc/host.pem"
cp "$SECRETS/$name-key.pem" "$etc/host-key.pem"
cp "$SECRETS/consul-watchdog" "$etc/consul-watchdog.token"
cp "$SECRETS/prometheus.token" "$etc/prometheus.token"
chmod 644 "$etc/ca.pem"
interface=$(ip -o -4 addr show | awk -v a="$address/" 'index($4, a) == 1 {print $2; exit}')
[ -n "$interface" ] || { echo "node.sh: no interface here has the address $address" >&2; exit 1; }

# Consul: TLS to all other hosts; plain HTTP for this host's own processes only.
cat >"$etc/consul.hcl" <<HCL
node_name  = "$name"
datacenter = "dc1"
data_dir   = "$data/consul"
bind_addr  = "$address"
retry_join = [$(list "")]
retry_interval = "2s"
encrypt    = "$(secret gossip-consul)"

addresses {
  http  = "127.0.0.1"
  https = "127.0.0.1 $address"
  dns   = "127.0.0.1"
}
ports {
  http     = 8500
  https    = 8501
  grpc     = -1
  grpc_tls = -1
}
tls {
  defaults {
    ca_file         = "$etc/ca.pem"
    cert_file       = "$etc/host.pem"
    key_file        = "$etc/host-key.pem"
    verify_incoming = true
    verify_outgoing = true
  }
  internal_rpc {
    verify_server_hostname = true
  }
  https {
    verify_incoming = false # a token says who it is
  }
}
acl {
  enabled        = true
  default_policy = "deny"
  tokens {
    agent = "$(secret consul-node)"
HCL
if [ "$role" = server ]; then
  cat >>"$etc/consul.hcl" <<HCL
    initial_management = "$(secret consul-management)"
  }
}
server           = true
bootstrap_expect = $(echo $SERVERS | wc -w)
HCL
else
  printf '  }\n}\n' >>"$etc/consul.hcl"
fi
cat >>"$etc/consul.hcl" <<HCL
connect {
  enabled = false
}
disable_update_check = true
# As Consul recommends; with the default an election takes five times as long.
performance {
  raft_multiplier = 1
}
HCL

# Nomad: TLS everywhere.
cat >"$etc/nomad.hcl" <<HCL
name       = "$name"
datacenter = "dc1"
data_dir   = "$data/nomad"
bind_addr  = "0.0.0.0"

advertise {
  http = "$address"
  rpc  = "$address"
  serf = "$address"
}
tls {
  http                   = true
  rpc                    = true
  ca_file                = "$etc/ca.pem"
  cert_file              = "$etc/host.pem"
  key_file               = "$etc/host-key.pem"
  verify_server_hostname = true
  verify_https_client    = false # a token says who it is
}
acl {
  enabled = true
}
consul {
  address = "127.0.0.1:8500"
  token   = "$(secret consul-nomad)"
}
disable_update_check = true
HCL
if [ "$role" = server ]; then
  cat >>"$etc/nomad.hcl" <<HCL
server {
  enabled          = true
  bootstrap_expect = $(echo $SERVERS | wc -w)
  encrypt          = "$(secret gossip-nomad)"
  server_join {
    retry_join     = [$(list :4648)]
    retry_interval = "2s"
  }
}
HCL
else
  cat >>"$etc/nomad.hcl" <<HCL
client {
  enabled           = true
  servers           = [$(list :4647)]
  network_interface = "$interface"
  options = {
    "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean"
  }
}
plugin "raw_exec" {
  config {
    enabled = true
  }
}
HCL
fi

# nomad-watchdog: the same file on every host, because each uses Nomad and Consul on its own host.
cat >"$etc/nomad-watchdog.hcl" <<HCL
backend = "nomad"
shards  = 2

nomad {
  address = "https://127.0.0.1:4646"
  ca_cert = "$etc/ca.pem"
}
consul {
  address       = "https://127.0.0.1:8501"
  ca_cert       = "$etc/ca.pem"
  agent_address = "http://127.0.0.1:8500"
}
api {
  token "prometheus" {
    role = "viewer"
    file = "$etc/prometheus.token"
  }
}
agent_class "default" {
  beat = "5s"
  variables = {
    python            = "${PYTHON:-python3}"
    consul_token_file = "$etc/consul-watchdog.token"
  }
  probe "http" {
    port = 18080
    path = "/"
  }
  confirm "icmp" {}
}
agent_pool "spare" {
  command = ["sleep", "86400"]
  min     = 1
  max     = 3
  scaler  = "none"
}
HCL

cat >"$etc/prometheus.yml" <<YAML
global:
  scrape_interval: 10s
rule_files: [$etc/*.rules.yml]
scrape_configs:
  - job_name: nomad-watchdog
    authorization: {credentials_file: $etc/prometheus.token}
    static_configs:
      - targets: [$(for client in ${CLIENTS:-}; do printf '"%s:9670", ' "$client"; done)]
YAML
