#!/usr/bin/env bash
# submit.sh JOBS
#
# Installs nomad-watchdog on a cluster after bootstrap.sh: the registry, the control plane as a job with two
# replicas, and the simulator. JOBS is the folder jobs/ of the repository. Run it on one server. It can be
# repeated.
#
#   SECRETS ETC      as for bootstrap.sh
#   NOMAD WATCHDOG   the programs                 [from PATH; the second one is nomad-watchdog]
#   PYTHON           interpreter for the simulator [python3]
#   DEVICES          number of simulated devices  [10]
set -euo pipefail
jobs=$1
etc=${ETC:-/etc/nomad-watchdog-cluster}
nomad=${NOMAD:-nomad} watchdog=${WATCHDOG:-$(command -v nomad-watchdog)}
umask 077
# The programs read their tokens from the environment, so that no argument contains one.
export NOMAD_ADDR=https://127.0.0.1:4646 NOMAD_CACERT=$etc/ca.pem NOMAD_TOKEN
NOMAD_TOKEN=$(cat "$SECRETS/nomad-management")

left=120
until [ "$("$nomad" node status -t '{{range .}}{{.Status}} {{end}}' | grep -ow ready | wc -l)" -ge 2 ]; do
  left=$((left - 1))
  [ $left -gt 0 ] || { echo "submit: two clients are not ready in time" >&2; exit 1; }
  sleep 1
done
echo "submit: two clients are ready"

# nomad-watchdog: its tokens are stored in a Nomad variable, through standard input.
printf '{"Items": {"api_token": "%s", "agent_key": "%s", "nomad_token": "%s", "consul_token": "%s"}}' \
  "$(cat "$SECRETS/api.token")" "$(cat "$SECRETS/agent.keys")" \
  "$(cat "$SECRETS/nomad-reconciler")" "$(cat "$SECRETS/consul-reconciler")" |
  "$nomad" var put -force -in json nomad/jobs/nomad-watchdog - >/dev/null
CONSUL_HTTP_TOKEN=$(cat "$SECRETS/consul-reconciler") "$watchdog" --config "$etc/nomad-watchdog.hcl" init
"$nomad" job run -detach -var replicas=2 -var config="$etc/nomad-watchdog.hcl" -var command="$watchdog" \
  "$jobs/nomad-watchdog.nomad.hcl"
"$nomad" job run -detach -var devices="${DEVICES:-10}" -var python="${PYTHON:-python3}" \
  "$jobs/cluster/simulator.nomad.hcl"
echo "submit: the control plane and the simulator are submitted"
