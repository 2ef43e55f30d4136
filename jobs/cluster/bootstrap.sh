#!/usr/bin/env bash
# bootstrap.sh JOBS
#
# Creates the ACLs of a new cluster after Consul and Nomad were started on its servers: policies, and the
# tokens of nomad-watchdog and its agents. JOBS is the folder jobs/ of the repository. Run it on one server.
# It can be repeated.
#
#   SECRETS        folder created by secrets.sh; the Nomad token of the control plane is added to it
#   ETC            as for node.sh
#   NOMAD CONSUL   the programs      [from PATH]
set -euo pipefail
jobs=$1
etc=${ETC:-/etc/nomad-watchdog-cluster}
nomad=${NOMAD:-nomad} consul=${CONSUL:-consul}
umask 077
# The programs read their tokens from the environment, so that no argument contains one.
export NOMAD_ADDR=https://127.0.0.1:4646 NOMAD_CACERT=$etc/ca.pem
export CONSUL_HTTP_ADDR=https://127.0.0.1:8501 CONSUL_CACERT=$etc/ca.pem
export CONSUL_HTTP_TOKEN NOMAD_TOKEN
CONSUL_HTTP_TOKEN=$(cat "$SECRETS/consul-management")
NOMAD_TOKEN=$(cat "$SECRETS/nomad-management")

say() { echo "bootstrap: $*"; }
wait_for() { # WHAT SECONDS COMMAND…
  local what=$1 left=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    left=$((left - 1))
    [ $left -gt 0 ] || { say "$what: not in time; last: $("$@" 2>&1 | tail -3)" >&2; exit 1; }
    sleep 1
  done
  say "$what"
}

# Consul: a policy per kind of client, and the token that its hosts already have.
wait_for "consul has a leader" 120 "$consul" acl policy list
# Sessions only on the clients, where control planes and agents run. Each has its certificate here.
sessions() {
  for key in "$SECRETS"/*-key.pem; do
    cert=${key%-key.pem}.pem
    openssl x509 -in "$cert" -noout -ext subjectAltName 2>/dev/null | grep -q DNS:client. || continue
    printf 'session "%s" { policy = "write" }\n' "$(basename "$cert" .pem)"
  done
}
policy() { # NAME FILE [MORE RULES]
  "$consul" acl policy read -name "$1" >/dev/null 2>&1 ||
    { cat "$2"; echo "${3:-}"; } | "$consul" acl policy create -name "$1" -rules - >/dev/null
  # In the body of a request, because every process can read arguments.
  CONSUL_HTTP_TOKEN=$(cat "$SECRETS/$1") "$consul" acl token read -self >/dev/null 2>&1 ||
    printf '{"SecretID": "%s", "Description": "%s", "Policies": [{"Name": "%s"}]}' \
      "$(cat "$SECRETS/$1")" "$1" "$1" |
    curl -fsS --cacert "$etc/ca.pem" -H @<(echo "X-Consul-Token: $CONSUL_HTTP_TOKEN") \
      -X PUT --data @- "$CONSUL_HTTP_ADDR/v1/acl/token" >/dev/null
}
policy consul-node "$jobs/cluster/consul-node.hcl"
policy consul-nomad "$jobs/cluster/consul-nomad.hcl"
policy consul-reconciler "$jobs/policies/consul-reconciler.hcl" "$(sessions)"
policy consul-watchdog "$jobs/policies/consul-agent.hcl" "$(sessions)"
say "consul's policies and tokens are there"

# Nomad
bootstrap_nomad() {
  "$nomad" acl token self >/dev/null 2>&1 || "$nomad" acl bootstrap "$SECRETS/nomad-management"
}
wait_for "nomad has a leader and ACLs" 120 bootstrap_nomad
"$nomad" acl policy apply nomad-watchdog "$jobs/policies/nomad-reconciler.hcl" >/dev/null
"$nomad" acl policy apply nomad-watchdog-pools "$jobs/policies/nomad-pools.hcl" >/dev/null
if [ ! -s "$SECRETS/nomad-reconciler" ]; then
  # Written under another name first, so that a failure leaves no empty token.
  "$nomad" acl token create -name nomad-watchdog -policy nomad-watchdog -policy nomad-watchdog-pools \
    -t '{{.SecretID}}' >"$SECRETS/nomad-reconciler.new"
  mv "$SECRETS/nomad-reconciler.new" "$SECRETS/nomad-reconciler"
fi
say "nomad's policies and tokens are there"
