#!/bin/sh
# Register a person once, make a video of them, follow it, fetch it: curl, and sed for the ids.
#   proteus-deploy serve demo/bundle
#   sh examples/curl.sh http://127.0.0.1:8000 demo/photo.png out.mp4
set -eu
url=$1 photo=$2 output=$3
id_of() { sed 's/.*"id":"\([a-z]*_[0-9a-f]*\)".*/\1/'; }

person=$(curl --fail --silent --show-error "$url/v1/characters" -F name=Anna -F input_reference=@"$photo" | id_of)
video=$(curl --fail --silent --show-error "$url/v1/videos" -F prompt="a person waves" -F character="$person" \
  -F num_inference_steps=25 -F guidance_scale=1.25 -F seed=42 | id_of)
curl --fail --silent --show-error --no-buffer "$url/v1/videos/$video/events" | grep '^event:'
curl --fail --silent --show-error "$url/v1/videos/$video/content" --output "$output"
