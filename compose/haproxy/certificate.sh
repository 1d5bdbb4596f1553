#!/bin/sh
# Makes a self-signed certificate for HAProxy, unless there is one that lasts another week.
# usage: certificate.sh FILE [OWNER]
set -eu
umask 077
file=$1
if [ -s "$file" ] && openssl x509 -in "$file" -noout -checkend 604800 >/dev/null; then
    echo "$file is good until $(openssl x509 -in "$file" -noout -enddate | cut -d= -f2)"
    exit 0
fi
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 397 \
    -subj "/CN=PushUp example" -addext "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1" \
    -keyout "$file.key" -out "$file.crt" 2>/dev/null
cat "$file.crt" "$file.key" >"$file.new"
rm "$file.crt" "$file.key"
[ -z "${2:-}" ] || chown "$2" "$file.new"
mv "$file.new" "$file"
echo "$file is new, and signed by nobody: browsers will ask whether to trust it"
