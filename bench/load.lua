-- Arguments: GET and the number of rows to choose from, or POST and a prefix of emails.
-- Prints the figures of the run as one line of JSON.

function init(arguments)
  method, argument, count = arguments[1], arguments[2], 0
end

function request()
  if method == "GET" then
    return wrk.format("GET", "/users/" .. math.random(1, tonumber(argument)))
  end
  count = count + 1
  local user = '{"email": "%s-%d@example.com", "full_name": "Ada Lovelace"}'
  return wrk.format("POST", "/users", {["Content-Type"] = "application/json"},
                    user:format(argument, count))
end

function done(summary, latency, _)
  local errors = summary.errors
  print(('{"requests": %d, "seconds": %f, "failures": %d, "p50": %f, "p99": %f}'):format(
    summary.requests, summary.duration / 1e6,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
