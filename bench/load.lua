-- Arguments: GET and the number of users to choose from, or POST and a prefix of emails.
-- The last line that it prints is of the run: answers, seconds, failures.

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

function done(summary, _, _)
  local errors = summary.errors
  print(summary.requests, summary.duration / 1e6,
        errors.connect + errors.read + errors.write + errors.status + errors.timeout)
end
