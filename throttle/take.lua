-- Carry out commands on buckets and windows: the arithmetic of take.py, bucket.py and window.py, line
-- by line, so that the same history gives the same answers to the last bit. `throttle/redis.py` packs
-- the commands and unpacks the answers; tests/test_lua.py compares both arithmetics.
--
-- Times are whole microseconds of the server's clock in doubles (exact below 2^53). Everything that
-- is packed, is packed as little-endian doubles unless said otherwise.
--
--   KEYS     for each target: the key of its hold, then the key of each of its quotas
--   ARGV[1]  the targets, each: the number of quotas; for each quota: algorithm (1 token bucket,
--            2 sliding window), limit, window, burst
--   ARGV[2]  the commands, each: verb, the number of its target (from 1), and what the verb needs:
--              1 take   max_wait; for each quota: cost
--              2 give   act, undo (1 or 0); for each quota: charged, cost, serial, last, spilled
--              3 hold   duration
--              4 reset
--   Answers  one for each command, in order: of a take five integers of 8 bytes (granted, now, act,
--            hold, binding from 0) and for each quota: level (a double), full_at, serial, last
--            (integers of 8 bytes), spilled (a double); of a give what each charge now counts for; of a hold its end, an
--            integer; of a reset nil. A command that failed alone is answered by its error.
--
-- A value is one string. Token bucket: tokens, at, rate, burst, last, serial, born, floor, firm, stopped,
-- expires, and pairs (epoch, peak). Sliding window: at, dropped, serial, floor, expires, first, count,
-- and records (time, sum so far), of which `count` from the one numbered `first` are alive. `expires`
-- is the instant the key goes: kept here, it need not be asked for. A hold is plain text: its end,
-- and when it was set.
--
-- Redis runs all of this file at each call, so a function costs something before it is called: few
-- of them, few upvalues, and what belongs to one algorithm is made when a quota asks for it.

local time = redis.call("TIME")
local now = time[1] * 1000000 + time[2]

local LONG_AGO = -2 ^ 60
local LONGEST_WAIT = 2 ^ 52
local GRACE = 1000000

-- Whether it is an instant or a serial that sums of doubles can carry; false for NaN.
local function whole(number)
  return number >= -2 ^ 53 and number <= 2 ^ 53
end

-- ------------------------------------------------------------------------------ token bucket

local function token_bucket()
  local EPOCHS = 16
  local HEAD = 88
  local bucket = {}

  local function epoch_length(quota)
    return math.min(math.max(math.floor(quota.window / EPOCHS), 2000000), 15000000)
  end

  function bucket.new(quota)
    return {
      tokens = quota.burst, at = now, rate = quota.rate, burst = quota.burst,
      last = now - LONGEST_WAIT, serial = now, born = now, floor = now, firm = now,
      stopped = now, expires = 0, peaks = {},
    }
  end

  -- Return the state in a key, or nil when what it holds is none of ours; an error as it is.
  function bucket.read(key)
    local value = redis.pcall("GET", key)
    if type(value) == "table" then
      return nil, value
    end
    local extra = value and #value - HEAD
    if not extra or extra < 0 or extra % 16 ~= 0 or extra > 16 * EPOCHS then
      return nil
    end
    local state = {}
    state.tokens, state.at, state.rate, state.burst, state.last, state.serial, state.born,
      state.floor, state.firm, state.stopped, state.expires = struct.unpack("<ddddddddddd", value)
    if not (
      state.tokens - state.tokens == 0 and state.rate > 0 and state.rate < math.huge
      and state.burst > 0 and state.burst < math.huge
      and whole(state.at) and whole(state.last) and whole(state.serial) and whole(state.born)
      and whole(state.floor) and whole(state.firm) and whole(state.stopped)
      and whole(state.expires)
    ) then
      return nil
    end
    local count = extra / 8
    local peaks = { struct.unpack("<" .. ("d"):rep(count), value, HEAD + 1) }
    peaks[count + 1] = nil
    for index = 1, count, 2 do
      if not (whole(peaks[index]) and peaks[index + 1] > -math.huge) then
        return nil
      end
    end
    state.peaks = peaks
    return state
  end

  function bucket.write(key, state, life)
    local peaks = state.peaks
    local value = struct.pack(
      "<ddddddddddd" .. ("d"):rep(#peaks),
      state.tokens, state.at, state.rate, state.burst, state.last, state.serial, state.born,
      state.floor, state.firm, state.stopped, state.expires, unpack(peaks)
    )
    redis.call("SET", key, value, "PX", life)
  end

  -- Refill up to now; return by how much the clock went back (0: it did not). Only who `asks` sets
  -- the rate and the burst.
  function bucket.advance(state, quota, hold, asks)
    local at = state.at
    if now < at then
      state.last = state.last - (at - now)
      state.peaks = { math.floor(now / epoch_length(quota)) + EPOCHS, math.huge }
      state.at = now
      state.firm = state.serial
      return at - now
    end
    -- An ask that takes nothing leaves it as it was: nobody else is judged by its quota.
    state.tokens_before, state.at_before = state.tokens, at
    state.rate_before, state.burst_before, state.firm_before = state.rate, state.burst, state.firm
    local begin = at > hold and at or math.min(hold, now)
    if now > begin then
      state.tokens = state.tokens + state.rate * (now - begin)
    end
    state.at = now
    if asks and (quota.rate ~= state.rate or quota.burst ~= state.burst) then
      state.rate = quota.rate
      state.burst = quota.burst
      state.firm = state.serial
    end
    state.tokens = math.min(state.tokens, state.burst)
    return 0
  end

  function bucket.revert(state)
    state.tokens, state.at = state.tokens_before, state.at_before
    state.rate, state.burst, state.firm = state.rate_before, state.burst_before, state.firm_before
  end

  -- Return the first instant at or after `start` that the line reaches `cost`.
  function bucket.earliest(state, quota, cost, start)
    local short = cost - state.tokens
    if short <= 0 then
      return start
    end
    return start + math.ceil(math.min(math.max(short / state.rate - 0.5, 0), LONGEST_WAIT))
  end

  function bucket.full_at(state, quota, start)
    return bucket.earliest(state, quota, math.max(quota.burst, state.burst), start)
  end

  function bucket.level(state, quota)
    return state.tokens
  end

  -- Charge, and return the receipt: the serial of this charge, the latest act before it, and what
  -- the bucket could not hold until the act.
  function bucket.charge(state, quota, cost, start, act)
    local later = quota.rate * (act - start)
    local room = quota.burst - later
    local spilled = math.max(state.tokens - room, 0)
    state.tokens = math.min(state.tokens, room)
    local level = state.tokens + later
    -- Raise the peak of the epoch of `act`; the pairs stand newest epoch first.
    local peaks, place = state.peaks, 1
    local epoch = math.floor(act / epoch_length(quota))
    while peaks[place] and peaks[place] > epoch do
      place = place + 2
    end
    if peaks[place] == epoch then
      peaks[place + 1] = math.max(peaks[place + 1], level)
    else
      table.insert(peaks, place, level)
      table.insert(peaks, place, epoch)
      peaks[2 * EPOCHS + 2], peaks[2 * EPOCHS + 1] = nil, nil
    end
    state.tokens = state.tokens - cost
    local last = state.last
    state.serial = state.serial + 1
    state.last = math.max(last, act)
    return state.serial, last, spilled
  end

  -- Return what the charge now counts for, and whether the state changed.
  function bucket.give(state, quota, given, act, undo)
    local surplus = given.charged - given.cost
    if state.born < given.serial and given.serial <= state.floor then
      return given.charged, false -- A reset has forgotten it.
    end
    local tokens = state.tokens
    if surplus <= 0 then
      state.tokens = tokens + surplus
      return given.cost, state.tokens ~= tokens
    end
    if given.serial <= state.floor or act > state.last then
      return given.charged, false -- The charge of a bucket that was full and dropped since.
    end
    local firm = given.serial <= state.firm
    local peaks, first = state.peaks, firm and -LONGEST_WAIT or math.floor(act / epoch_length(quota))
    local newest = undo and given.serial == state.serial
    local back = surplus
    if not newest then
      local highest = tokens
      for place = 1, #peaks, 2 do
        if peaks[place] >= first then
          highest = math.max(highest, peaks[place + 1])
        end
      end
      if #peaks == 2 * EPOCHS and first < peaks[2 * EPOCHS - 1] then
        highest = math.huge
      end
      back = math.max(math.min(surplus, state.burst - highest), 0)
      if not firm then
        back = math.max(back, surplus - state.rate * (state.last - act))
      end
    end
    if newest and given.serial > state.stopped then
      state.tokens = state.tokens + given.spilled
    end
    state.tokens = math.min(state.tokens + back, state.burst)
    local changed = newest or state.tokens ~= tokens
    for place = 1, #peaks, 2 do
      if peaks[place] >= first then
        local peak = peaks[place + 1]
        peaks[place + 1] = peak + back
        changed = changed or peaks[place + 1] ~= peak
      end
    end
    if newest then
      state.serial = state.serial - 1
      state.last = given.last
      state.firm = math.min(state.firm, state.serial)
      state.stopped = math.min(state.stopped, state.serial)
    end
    return given.charged - back, changed
  end

  function bucket.stop(state)
    state.tokens = math.min(state.tokens, 0)
    state.stopped = state.serial
  end

  function bucket.reset(state, quota)
    state.tokens = quota.burst
    state.floor = state.serial
    state.peaks = {}
  end

  return bucket
end

-- ---------------------------------------------------------------------------- sliding window
--
-- Thousands of records are searched and a few are read: they stay in Redis (`kept` of them, from the
-- one numbered `first` on) and are fetched by the chunk. What is added or changed stands in tables
-- behind them and is written over the end of the string. Indices are those of the Python lists:
-- from 0, over both.

local function sliding_window()
  local EXACT_ENTRIES = 4096
  local GRAINS = 2048
  local HEAD = 56
  local CHUNK = 32
  local window = {}

  local function entries(state)
    return state.kept + #state.times
  end

  -- Return the time and the sum of a record.
  local function record(state, index)
    if index >= state.kept then
      local place = index - state.kept + 1
      return state.times[place], state.sums[place]
    end
    local number = state.first + index
    local place = number % CHUNK
    local chunk = state.chunks[number - place]
    if not chunk then
      local byte = HEAD + 16 * (number - place)
      chunk = redis.call("GETRANGE", state.key, byte, byte + 16 * CHUNK - 1)
      state.chunks[number - place] = chunk
    end
    if #chunk < 16 * (place + 1) then
      return 0 / 0, 0 / 0
    end
    return struct.unpack("<dd", chunk, 16 * place + 1)
  end

  local function sum_at(state, index)
    local _, sum = record(state, index)
    return sum
  end

  function window.new(quota)
    return {
      at = now, dropped = 0, serial = now, floor = now, expires = 0,
      first = 0, kept = 0, times = {}, sums = {}, chunks = {}, renewed = true,
    }
  end

  -- Return the state in a key, or nil when what it holds is none of ours; an error as it is.
  function window.read(key)
    local value = redis.pcall("GETRANGE", key, 0, HEAD - 1)
    if type(value) == "table" then
      return nil, value
    end
    if #value ~= HEAD then
      return nil
    end
    local state = { key = key, times = {}, sums = {}, chunks = {} }
    state.at, state.dropped, state.serial, state.floor, state.expires, state.first, state.kept =
      struct.unpack("<ddddddd", value)
    local first, kept = state.first, state.kept
    if not (
      whole(state.at) and state.dropped - state.dropped == 0 and whole(state.serial)
      and whole(state.floor) and whole(state.expires)
      and first >= 0 and first % 1 == 0 and first < 2 ^ 25
      and kept >= 0 and kept % 1 == 0 and kept < 2 ^ 25
    ) then
      return nil
    end
    if kept > 0 then
      local instant, sum = record(state, kept - 1)
      if not (whole(instant) and sum - sum == 0) then
        return nil
      end
    end
    return state
  end

  -- Move the records from `index` on into the tables, where they can be changed.
  local function unfold(state, index)
    if index >= state.kept then
      return
    end
    local times, sums = {}, {}
    for known = index, entries(state) - 1 do
      times[#times + 1], sums[#sums + 1] = record(state, known)
    end
    state.kept, state.times, state.sums = index, times, sums
  end

  function window.write(key, state, life)
    if not state.renewed and state.first > 2 * CHUNK and state.first > entries(state) then
      -- Most of the string is dead: begin a new one.
      unfold(state, 0)
      state.renewed = true
    end
    if state.renewed then
      state.first = 0
    end
    local head = struct.pack(
      "<ddddddd", state.at, state.dropped, state.serial, state.floor, state.expires,
      state.first, entries(state)
    )
    local tail = {}
    for place, instant in ipairs(state.times) do
      tail[place] = struct.pack("<dd", instant, state.sums[place])
    end
    if state.renewed then
      redis.call("SET", key, head .. table.concat(tail), "PX", life)
    else
      redis.call("SETRANGE", key, 0, head)
      if #tail > 0 then
        redis.call("SETRANGE", key, HEAD + 16 * (state.first + state.kept), table.concat(tail))
      end
      redis.call("PEXPIRE", key, life)
    end
  end

  -- Return the first index whose value is not below `bound`.
  local function bisect_left(state, value_at, bound)
    local count = entries(state)
    local low, high = 0, 1
    -- Mostly it is among the oldest: look there first, in steps that double.
    while high < count and value_at(state, high - 1) < bound do
      low, high = high, 2 * high
    end
    high = math.min(high, count)
    while low < high do
      local middle = math.floor((low + high) / 2)
      if value_at(state, middle) < bound then
        low = middle + 1
      else
        high = middle
      end
    end
    return low
  end

  -- Forget the acts that left the window; return by how much the clock went back (0: it did not).
  function window.advance(state, quota, hold)
    local back = state.at - now
    state.at = now
    if back > 0 then
      unfold(state, 0)
      for place, instant in ipairs(state.times) do
        state.times[place] = instant - back
      end
      state.floor = state.serial
      return back
    end
    local count, left = entries(state), now - quota.window
    if count > 0 and record(state, 0) <= left then
      -- Times are whole: the first after `left` is the first not below `left + 1`.
      local gone = bisect_left(state, record, left + 1)
      -- From zero again when nothing is left: sums of fractions do not drift for ever.
      state.dropped = gone < count and sum_at(state, gone - 1) or 0
      for _ = 1, gone - state.kept do
        table.remove(state.times, 1)
        table.remove(state.sums, 1)
      end
      gone = math.min(gone, state.kept)
      state.first = state.first + gone
      state.kept = state.kept - gone
    end
    return 0
  end

  -- What left the window has left it for everyone: an ask that takes nothing changed nothing else.
  function window.revert()
  end

  -- Return the first instant, not before the newest act, at which `cost` more fits.
  function window.earliest(state, quota, cost, start)
    local count = entries(state)
    if count == 0 then
      return start
    end
    local newest, sum = record(state, count - 1)
    start = math.max(start, newest)
    local over = sum + cost - quota.limit - 1e-9 * quota.limit
    if over <= state.dropped then
      return start
    end
    -- The acts whose leaving makes room: all up to the first whose sum reaches `over`.
    local leaving = record(state, math.min(bisect_left(state, sum_at, over), count - 1))
    if not (leaving <= newest) then
      leaving = newest -- Only in a value that was tampered with.
    end
    return math.max(start, leaving + quota.window)
  end

  -- Charge, and return the receipt: the serial of this charge, and its act.
  function window.charge(state, quota, cost, start, act)
    local count = entries(state)
    local newest, total = nil, state.dropped
    if count > 0 then
      newest, total = record(state, count - 1)
    end
    local grain = math.max(math.floor(quota.window / GRAINS), 1)
    if newest and (
      newest == act
      or (count >= EXACT_ENTRIES and math.floor(act / grain) == math.floor(newest / grain))
    ) then
      unfold(state, count - 1)
    else
      count = count + 1
    end
    state.times[count - state.kept] = act
    state.sums[count - state.kept] = total + cost
    state.serial = state.serial + 1
    return state.serial, act
  end

  -- Return what the charge now counts for, and whether the state changed.
  function window.give(state, quota, given, act, undo)
    local index = bisect_left(state, record, act)
    if given.serial <= state.floor or index == entries(state) then
      return given.charged, false
    end
    if act <= state.at - quota.window then
      return given.cost, false
    end
    unfold(state, index)
    local sums, place = state.sums, index - state.kept + 1
    local before = index > 0 and sum_at(state, index - 1) or state.dropped
    local change = math.max(given.cost - given.charged, before - sums[place])
    local changed = false
    for later = place, #sums do
      local sum = sums[later]
      sums[later] = sum + change
      changed = changed or sums[later] ~= sum
    end
    -- Sums of fractions leave a residue: it must not stand as an act that nobody may overtake.
    if sums[place] - before <= 1e-9 * quota.limit then
      table.remove(state.times, place)
      table.remove(sums, place)
      changed = true
    end
    return given.charged + change, changed
  end

  function window.stop()
  end

  function window.reset(state)
    state.renewed, state.kept, state.times, state.sums = true, 0, {}, {}
    state.dropped = 0
    state.floor = state.serial
  end

  function window.level(state, quota)
    local count = entries(state)
    return quota.limit - (count > 0 and sum_at(state, count - 1) - state.dropped or 0)
  end

  function window.full_at(state, quota, start)
    local count = entries(state)
    if count == 0 then
      return start
    end
    return math.min(record(state, count - 1) + quota.window, start + LONGEST_WAIT)
  end

  return window
end

-- --------------------------------------------------------------------------------- the keys
--
-- Each key is read at its first use and written at most once, at the end: a command sees what those
-- before it did. A key that holds something else spoils the commands that need it, and no other.

local slots = {}

local function hold_slot(key)
  local slot = slots[key]
  if not slot then
    slot = { key = key, hold = LONG_AGO, held_at = LONG_AGO }
    local value = redis.pcall("GET", key)
    if type(value) == "table" then
      slot.error = value
    elseif value then
      local hold, held_at = value:match("^(%-?%d+) (%-?%d+)$")
      hold, held_at = tonumber(hold), tonumber(held_at)
      if hold and whole(hold) and whole(held_at) then
        slot.hold, slot.held_at = math.min(hold, now + LONGEST_WAIT), held_at
      end
    end
    slots[key] = slot
  end
  return slot
end

local function state_slot(key, quota)
  local slot = slots[key]
  if not slot then
    slot = { key = key, kind = quota.kind }
    slot.state, slot.error = quota.kind.read(key)
    slots[key] = slot
  end
  if not slot.state then
    slot.state, slot.fresh = quota.kind.new(quota), true
  end
  return slot
end

-- The command changed nothing here: what the next one finds is what this one found.
local function forget(slot)
  if slot.fresh then
    slot.state = nil
  elseif not slot.shifted then
    slot.kind.revert(slot.state)
  end
end

-- The state is to be written, and to live until it is full again, past any hold, and never shorter
-- than it would have.
local function keep(slot, full_at, hold)
  slot.dirty, slot.fresh = true, false
  slot.state.expires = math.max(slot.state.expires, math.max(full_at, hold) + GRACE)
end

-- Return the slots of a target with states as of now, and the slot of its hold; or the error that
-- spoils the command. When the clock went back, the hold and the states are shifted (rule 9): that
-- is written, whatever becomes of the command.
local function advance(target, asks)
  local holding = hold_slot(target.hold)
  local failed, own = holding.error, {}
  for index, quota in ipairs(target) do
    own[index] = state_slot(quota.key, quota)
    failed = failed or own[index].error
  end
  if failed then
    return nil, nil, failed
  end
  if now < holding.held_at then
    holding.hold = holding.hold - (holding.held_at - now)
    holding.held_at, holding.dirty = now, true
  end
  for index, quota in ipairs(target) do
    local slot = own[index]
    local back = slot.kind.advance(slot.state, quota, holding.hold, asks)
    slot.shifted = back > 0
    if slot.shifted then
      slot.dirty = true
      slot.state.expires = math.max(slot.state.expires - back, now + GRACE)
    end
  end
  return own, holding
end

-- ----------------------------------------------------------------------------- the commands

local function take(target, own, hold, max_wait, costs)
  local start = math.max(now, hold)
  local act, binding = start, 0
  for index, quota in ipairs(target) do
    if costs[index] > 0 then
      local earliest = quota.kind.earliest(own[index].state, quota, costs[index], start)
      if earliest > act then
        act, binding = earliest, index
      end
    end
  end
  local granted = act - now <= max_wait
  local decided = binding > 0
  local lowest = math.huge
  local answer = ""
  for index, quota in ipairs(target) do
    local slot = own[index]
    local state, kind = slot.state, quota.kind
    local charged = granted and costs[index] > 0
    local serial, last, spilled = 0, 0, 0
    if charged then
      serial, last, spilled = kind.charge(state, quota, costs[index], start, act)
    end
    local level, full_at = kind.level(state, quota), kind.full_at(state, quota, start)
    answer = answer .. struct.pack("<di8i8i8d", level, full_at, serial, last, spilled or 0)
    if not decided and level / quota.burst < lowest then
      lowest, binding = level / quota.burst, index
    end
    if charged then
      keep(slot, full_at, hold)
    else
      forget(slot)
    end
  end
  return struct.pack("<i8i8i8i8i8", granted and 1 or 0, now, act, hold, binding - 1) .. answer
end

local function give(target, own, hold, act, undo, gifts)
  local answer = ""
  for index, quota in ipairs(target) do
    local slot = own[index]
    local counts, changed = quota.kind.give(slot.state, quota, gifts[index], act, undo)
    answer = answer .. struct.pack("<d", counts)
    if changed then
      keep(slot, quota.kind.full_at(slot.state, quota, math.max(now, hold)), hold)
    else
      forget(slot)
    end
  end
  return answer
end

local kinds = {}
local targets, packed, place, key = {}, ARGV[1], 1, 1
while place <= #packed do
  local count
  count, place = struct.unpack("<d", packed, place)
  local target = { hold = KEYS[key] }
  for index = 1, count do
    local algorithm, limit, window, burst
    algorithm, limit, window, burst, place = struct.unpack("<dddd", packed, place)
    if not (limit > 0 and burst > 0 and window >= 1 and limit + burst + window < math.huge) then
      target.wrong = true
    end
    if not kinds[algorithm] then
      kinds[algorithm] = algorithm == 2 and sliding_window() or token_bucket()
    end
    target[index] = {
      key = KEYS[key + index], kind = kinds[algorithm],
      limit = limit, window = window, burst = burst, rate = limit / window,
    }
  end
  key = key + count + 1
  targets[#targets + 1] = target
end

local answers = {}
packed, place = ARGV[2], 1
while place <= #packed do
  local verb, number, max_wait, act, undo
  verb, number, place = struct.unpack("<dd", packed, place)
  local target = targets[number]
  local wrong, costs = target.wrong, {}
  if verb == 1 then
    max_wait, place = struct.unpack("<d", packed, place)
    wrong = wrong or max_wait ~= max_wait
    for index = 1, #target do
      costs[index], place = struct.unpack("<d", packed, place)
      wrong = wrong or costs[index] - costs[index] ~= 0
    end
  elseif verb == 2 then
    act, undo, place = struct.unpack("<dd", packed, place)
    wrong = wrong or not whole(act)
    for index = 1, #target do
      local gift = {}
      gift.charged, gift.cost, gift.serial, gift.last, gift.spilled, place =
        struct.unpack("<ddddd", packed, place)
      wrong = wrong or gift.charged - gift.charged ~= 0 or gift.cost - gift.cost ~= 0
      wrong = wrong or not (whole(gift.serial) and whole(gift.last))
      wrong = wrong or gift.spilled - gift.spilled ~= 0
      costs[index] = gift
    end
  elseif verb == 3 then
    max_wait, place = struct.unpack("<d", packed, place)
    wrong = wrong or not whole(max_wait)
  end

  local own, holding, answer
  if wrong then
    answer = redis.error_reply("ERR throttle: a number that is NaN, infinite or out of range")
  else
    own, holding, answer = advance(target, verb ~= 2)
  end
  if answer then
    -- It failed alone.
  elseif verb == 1 then
    answer = take(target, own, holding.hold, max_wait, costs)
  elseif verb == 2 then
    answer = give(target, own, holding.hold, act, undo == 1, costs)
  else
    if verb == 3 then
      holding.hold = math.max(holding.hold, math.min(now + max_wait, now + LONGEST_WAIT))
      holding.held_at = now
      answer = holding.hold
    else
      holding.hold, holding.held_at = LONG_AGO, LONG_AGO
      answer = false
    end
    holding.dirty = true
    for index, quota in ipairs(target) do
      local slot = own[index]
      if verb == 3 then
        quota.kind.stop(slot.state)
      else
        quota.kind.reset(slot.state, quota)
      end
      local start = math.max(now, holding.hold)
      keep(slot, quota.kind.full_at(slot.state, quota, start), start)
    end
  end
  answers[#answers + 1] = answer
end

for name, slot in pairs(slots) do
  if slot.dirty then
    local until_then = slot.state and slot.state.expires or slot.hold + GRACE
    -- At most ten years: Redis refuses what does not fit its own clock.
    local life = math.min(math.max(until_then - now, GRACE), 10 * 366 * 86400 * 1000000)
    life = ("%.0f"):format(math.ceil(life / 1000))
    if slot.state then
      slot.kind.write(name, slot.state, life)
    elseif slot.hold > LONG_AGO then
      redis.call("SET", name, ("%.0f %.0f"):format(slot.hold, slot.held_at), "PX", life)
    else
      redis.call("DEL", name)
    end
  end
end
return answers
