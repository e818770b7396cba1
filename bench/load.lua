-- Arguments: GET, or POST and a prefix that makes its emails new.
-- The last line that it prints is of the run: answers, seconds, failures.

local user = '{"email": "%s-%d@example.com", "full_name": "Ada Lovelace"}'
local headers = { ["Content-Type"] = "application/json" }

function init(arguments)
  method, prefix = arguments[1], arguments[2]
  count = 0
end

function request()
  if method == "GET" then
    return wrk.format("GET", "/users/" .. math.random(1, 1000))
  end
  count = count + 1
  return wrk.format("POST", "/users", headers, user:format(prefix, count))
end

function done(summary)
  local errors = summary.errors
  local broken = errors.connect + errors.read + errors.write
  local failures = broken + errors.status + errors.timeout
  print(summary.requests, summary.duration / 1e6, failures)
end
