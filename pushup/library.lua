#!lua name=pushup

-- What PushUp does inside Redis, each function atomic. `library.py` has its calls and replies as Python values.
--
-- KEYS[1] is the realm, pushup:{NAME}. Everything else it has begins with that and lies in the same cluster slot:
--   pushup:{NAME}            hash   `last` id given; `realm`; `bytes` of data cached in all channels; `c:CHANNEL` for every
--                                   channel (see `Realm` and `Facts`)
--   pushup:{NAME}:m:CHANNEL  zset   cached messages `[id,["channel",...],data]`, scored by id
--   pushup:{NAME}:s:CHANNEL  list   `ID SIZE` of each of them, oldest first; SIZE is that of its data in bytes
--   pushup:{NAME}:k:KEY      string idempotency key: id and digest of what was published
--   pushup:{NAME}:names      zset   all channels, by name
--   pushup:{NAME}:due        zset   all channels, by when to look whether they have expired
--   pushup:{NAME}:stale      zset   all channels, by when to look whether their oldest message is too old
--   pushup:{NAME}:closed     zset   names of closed channels, by the id of their last message
--   pushup:{NAME}:nodes      hash   what each node last said of itself
-- and on sharded pub/sub
--   pushup:{NAME}:BIRTH:a:CHANNEL  `PREV [id,["channel",...],data]`, `closed POSITION`, `made`
--   pushup:{NAME}:BIRTH:n:NODE     `POSITION FLOOR ORIGIN TOKEN [CHANNEL-IN-HEX TAIL ...]`, after the node's reads and ticks
-- where BIRTH is the id at which the realm came into being: pub/sub knows nothing of databases, and a realm of the same
-- name in another one must not be heard.
--
-- The facts of all channels are one key on purpose: a server that evicts keys, or loses some, loses them all together,
-- and a realm that begins anew tells everyone of a gap.
--
-- Publishing reads no message, only `ID SIZE`: so Redis can be told to let a user publish who may not read.
--
-- Numbers are exact doubles (ids stay below 2^53); `text` writes them, as Lua's own form has 14 digits only.
--
-- A publication is to cost little more than its commands, so what is made of texts again and again is remembered, in
-- bounded tables. Nothing depends on it: what is written in Redis is compared first.

local VERSION = 4
local SECOND = 1000000
local DAY = 86400 * SECOND
local MAX_ID = 9007199254740991
local NAME_BYTES = 255
local NESTING = 100
local NAMES_AT_ONCE = 1000
local CLOSED_REMEMBERED = 10000
local STALLED = 4 * SECOND
local DOUBTED = 2 * SECOND
local NODE_FORGOTTEN = 60 * SECOND
local SWEPT_AT_ONCE = 100
local READ_AT_ONCE = 128
local RETRY = 60 * SECOND
local REALM_BYTES = 268435456
local REMEMBERED = 4096

local register_function = redis.register_function

-- Redis finds globals by a detour, and has none of these while it loads the library; so they are looked up once.
local function globals()
  return redis, cjson, string, math, ipairs, pcall, tonumber, unpack
end
local redis, cjson, string, math, ipairs, pcall, tonumber, unpack

-- How whole numbers are formatted: twice as fast where the machine's integers are long enough.
local number_format, facts_format

local function prepare()
  redis, cjson, string, math, ipairs, pcall, tonumber, unpack = globals()
  number_format = string.format('%d', MAX_ID) == '9007199254740991' and '%d' or '%.0f'
  facts_format = string.rep(number_format .. ' ', 8) .. number_format
end

local function text(number)
  return string.format(number_format, number)
end

-- What texts were parsed to. It is taken out to be used, as it may be changed then, and kept again with the text that was
-- written of it: so a call that fails half-way leaves nothing wrong.
local function memory(most)
  local values, count = {}, 0
  local function take(written)
    local value = values[written]
    if value then
      values[written] = nil
      count = count - 1
    end
    return value
  end
  local function keep(written, value)
    if count >= most then
      values, count = {}, 0
    end
    values[written] = value
    count = count + 1
  end
  return take, keep
end

local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) * SECOND + tonumber(time[2])
end

-- Refusals are raised as tables by whatever finds them, and become Redis errors with a code of their own.
local function refuse(code, sentence)
  error({refusal = code .. ' ' .. sentence})
end

-- An id of this server process. A restart and a failover change it, and then writes may have been lost.
local run
local function run_id()
  if not run then
    local info = redis.pcall('INFO', 'server')
    if type(info) == 'string' then
      run = string.match(info, 'run_id:(%w+)')
    elseif not redis.acl_check_cmd then
      run = 'none' -- This is fakeredis, which has no INFO here either.
    end
    if not run then
      refuse('NOPERM', 'PushUp needs the permission +info to notice a restart')
    end
  end
  return run
end

local function whole(given, least)
  if not string.find(given or '', '^%d+$') or tonumber(given) > MAX_ID or tonumber(given) < least then
    refuse('INVALID', 'an argument that must be a whole number, at least ' .. least .. ', is not')
  end
  return tonumber(given)
end

-- What an error says.
local function sentence(raised)
  return type(raised) == 'table' and (raised.refusal or raised.err) or tostring(raised)
end

local function guarded(callback)
  return function(keys, args)
    if not number_format then
      prepare()
    end
    if not keys[1] or not string.find(keys[1], '^pushup:{[%w._-]+}$') then
      return redis.error_reply('INVALID the key is pushup:{REALM}')
    end
    local good, result = pcall(callback, keys[1], args)
    if good then
      return result
    end
    return redis.error_reply(sentence(result))
  end
end

-- Names and data

local UTF8 = {
  '[\194-\223][\128-\191]', '\224[\160-\191][\128-\191]', '[\225-\236\238\239][\128-\191][\128-\191]',
  '\237[\128-\159][\128-\191]', '\240[\144-\191][\128-\191][\128-\191]',
  '[\241-\243][\128-\191][\128-\191][\128-\191]', '\244[\128-\143][\128-\191][\128-\191]',
}

local function is_utf8(bytes)
  if not string.find(bytes, '[\128-\255]') then
    return true
  end
  for _, pattern in ipairs(UTF8) do
    bytes = string.gsub(bytes, pattern, ' ')
  end
  return not string.find(bytes, '[\128-\255]')
end

local function is_integer(name)
  return not string.find(name, '%D')
end

local function check_name(name)
  if string.find(name, '^%a[%w:_-]*$') and #name <= NAME_BYTES then
    return
  end
  if name == '' or name == '.' or name == '..' then
    refuse('INVALID', "a channel's name is not empty, '.' or '..'")
  end
  if #name > NAME_BYTES then
    refuse('INVALID', "a channel's name is at most " .. NAME_BYTES .. ' bytes long in UTF-8')
  end
  if string.find(name, '[%z\1-\31\127]') or string.find(name, '\194[\128-\159]') then
    refuse('INVALID', "a channel's name has no control characters")
  end
  if not is_utf8(name) then
    refuse('INVALID', "a channel's name is UTF-8")
  end
  if is_integer(name) and (string.sub(name, 1, 1) == '0' or #name > 16 or tonumber(name) > MAX_ID) then
    refuse('INVALID', 'a name of digits only is an integer channel, between 1 and ' .. text(MAX_ID))
  end
end

-- How many arrays and objects are in one another.
local function depth(json)
  local bare = string.gsub(string.gsub(json, '\\.', ''), '"[^"]*"', '')
  local now, deepest = 0, 0
  for bracket in string.gmatch(bare, '[%[%]{}]') do
    now = now + ((bracket == '[' or bracket == '{') and 1 or -1)
    deepest = math.max(deepest, now)
  end
  return deepest
end

local function check_data(data, most)
  if #data > most then
    refuse('TOOLARGE', 'data is ' .. #data .. ' bytes of JSON; the limit is ' .. text(most))
  end
  local plain = string.find(data, '^[ -~]*$')
  local good, values = pcall(cjson.decode, '[' .. data .. ']')
  if not good or #values ~= 1 or not (plain or is_utf8(data)) then
    refuse('INVALID', 'data is not valid JSON')
  end
  if #data > 2 * NESTING then -- Whatever is nested deeper has so many brackets.
    local _, opened = string.gsub(data, '[%[{]', '')
    if opened > NESTING and depth(data) > NESTING then
      refuse('INVALID', 'the data is nested more than ' .. NESTING .. ' levels deep')
    end
  end
  if not plain and string.find(data, '[\r\n]') then
    data = string.gsub(data, '[\r\n]', ' ')
  end
  return data
end

-- Realm: run of the server process that wrote last, whether that server keeps every acknowledged write over a restart
-- (1), the id at which the realm came into being, the last one given before that run, the floor of all channels, that of
-- channels not known here, the number of channels and of closed ones remembered; then the defaults: ttl, window,
-- max_messages, idempotency window, whether named channels come into being by being used, most bytes of a message, most
-- channels of a publication, most bytes of data cached in the realm. Times in microseconds.

local REALM = {'birth', 'since', 'floor', 'unknown', 'channels', 'closed', 'ttl', 'window', 'max_messages',
  'idempotency', 'implicit', 'message_bytes', 'publish_channels', 'realm_bytes'}

local take_realm, keep_realm = memory(100)

local function parse_realm(written)
  local realm = take_realm(written)
  if not realm then
    realm = {realm_bytes = REALM_BYTES} -- Version 1 wrote none.
    local rest
    realm.run, realm.kept, rest = string.match(written, '^(%w+) (%d) (.*)$')
    local at = 1
    for number in string.gmatch(rest, '%d+') do
      realm[REALM[at]] = tonumber(number)
      at = at + 1
    end
    realm.written = written
  end
  return realm
end

local function save_realm(key, realm)
  local words = {realm.run, realm.kept}
  for at, field in ipairs(REALM) do
    words[at + 2] = text(realm[field])
  end
  realm.written = table.concat(words, ' ')
  redis.call('HSET', key, 'realm', realm.written)
end

-- Facts of a channel: id of its last message, kept or not (0: none), floor, id of the oldest message kept (0: none),
-- ttl, window, max_messages, when it was made, when it expires, bytes of data of the messages kept (version 1 wrote none:
-- its messages have no sizes, and go as if Redis had lost them).

local take_facts, keep_facts = memory(REMEMBERED)

local function parse_facts(written)
  local facts = take_facts(written)
  if facts then
    return facts
  end
  local tail, bottom, first, ttl, window, most, created, expires, bytes =
    string.match(written, '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) ?(%d*)$')
  return {tail = tonumber(tail), floor = tonumber(bottom), first = tonumber(first), ttl = tonumber(ttl),
    window = tonumber(window), max_messages = tonumber(most), created = tonumber(created), expires = tonumber(expires),
    bytes = tonumber(bytes) or 0}
end

local function show_facts(facts)
  return string.format(facts_format, facts.tail, facts.floor, facts.first, facts.ttl,
    facts.window, facts.max_messages, facts.created, facts.expires, facts.bytes)
end

local function save_facts(key, realm, name, facts)
  redis.call('HSET', key, 'c:' .. name, show_facts(facts), 'bytes', text(realm.bytes))
end

-- The realm's bytes are the sum of its channels' at any time: both change here, and are written in one command. They lie
-- in one key, so that they are lost together. A channel's bytes may lag behind Redis, which drops messages by itself:
-- they are corrected whenever the channel is looked at (see `trim`), at the latest by `make_room`, before a refusal.
local function weigh(realm, facts, bytes)
  facts.bytes = facts.bytes + bytes
  realm.bytes = realm.bytes + bytes
end

-- Some of what was acknowledged may be missing: nobody's cursor from before is good without a gap.
local function lose(key, realm, now, seen)
  realm.last = math.max(now, realm.last + 1, seen + 1)
  realm.since = realm.last
  realm.floor = realm.last + 1
  redis.call('HSET', key, 'last', text(realm.last))
  save_realm(key, realm)
end

-- A master that was frozen may have been replaced meanwhile, and not know it yet: what it acknowledges in that state is
-- lost. While a node is there, it ticks every second; so a server that has replicas, or is one of a cluster, and finds
-- that nothing has happened for longer, takes no writes until it has had time to hear from the others.
local doubt_until = 0
local function suspect(key, realm, now)
  if now - realm.last > STALLED then
    local info = redis.pcall('INFO', 'replication', 'cluster')
    if type(info) == 'string' and not (string.find(info, 'connected_slaves:0') and string.find(info, 'cluster_enabled:0')) then
      doubt_until = now + DOUBTED
      realm.last = now - 1
      redis.call('HSET', key, 'last', text(realm.last))
    end
  end
end

local function refuse_in_doubt(now)
  if now < doubt_until then
    refuse('TRYAGAIN', 'nothing was heard here for a while, and another server may have taken over')
  end
end

-- The realm as it is now, with the facts of the channels named. `seen` is the highest id the caller knows of: all
-- cursors it handed out are at most one above. Notices that the store has lost something, before anything else is done.
local function open(key, seen, names)
  seen = tonumber(seen) or 0
  local fields = {'last', 'realm', 'bytes'}
  for at, name in ipairs(names) do
    fields[at + 3] = 'c:' .. name
  end
  local found = redis.call('HMGET', key, unpack(fields))
  local now = clock()
  if seen > now + DAY then
    refuse('INVALID', 'the id seen lies more than a day ahead of the clock of Redis')
  end
  local realm
  if not found[1] or not found[2] then
    -- A new realm, or one whose heart was lost.
    redis.call('DEL', key, key .. ':names', key .. ':due', key .. ':stale', key .. ':closed')
    local last = math.max(now, seen + 1)
    realm = {run = run_id(), kept = '0', birth = last, since = last, floor = last + 1, unknown = last + 1, channels = 0, closed = 0,
      ttl = 3600 * SECOND, window = 300 * SECOND, max_messages = 1000, idempotency = 300 * SECOND, implicit = 1,
      message_bytes = 65536, publish_channels = 100, realm_bytes = REALM_BYTES}
    realm.last, realm.bytes = last, 0
    save_realm(key, realm)
    redis.call('HSET', key, 'last', text(last))
    found = {}
  else
    realm = parse_realm(found[2])
    realm.last, realm.bytes = tonumber(found[1]), tonumber(found[3]) or 0
    local before = realm.run
    realm.run = run_id()
    if seen > realm.last or (before ~= realm.run and realm.kept ~= '1') then
      lose(key, realm, now, seen)
    elseif before == realm.run then
      suspect(key, realm, now)
    else
      realm.since = realm.last
      save_realm(key, realm)
    end
  end
  local facts = {}
  for at = 1, #names do
    facts[at] = found[at + 3] and parse_facts(found[at + 3]) or false
  end
  return realm, facts, now
end

-- Where an answer comes from: which run of which server, and which life of the realm.
local function origin(realm)
  return realm.run .. ':' .. text(realm.birth)
end

local function pubsub(key, realm, kind, name)
  return key .. ':' .. text(realm.birth) .. ':' .. kind .. ':' .. name
end

-- An id above every one given so far; none below it is given from now on.
local function position(key, realm, now)
  if now > realm.last + 1 then
    realm.last = now - 1
    redis.call('HSET', key, 'last', text(realm.last))
  end
  return realm.last + 1
end

local function comes_into_being(realm, name)
  return realm.implicit == 1 and not is_integer(name)
end

-- What is below the floor of a channel that is not known here, and the last id it had if that is remembered.
local function unknown(key, realm, name)
  if redis.call('ZCARD', key .. ':closed') ~= realm.closed then
    realm.unknown = realm.last + 1
    realm.closed = redis.call('ZCARD', key .. ':closed')
    save_realm(key, realm)
  end
  local tail = tonumber(redis.call('ZSCORE', key .. ':closed', name) or 0)
  return tail, math.max(tail + 1, realm.unknown)
end

local function add(key, realm, name, now, ttl, window, most)
  local tail, bottom = unknown(key, realm, name)
  if tail > 0 then
    redis.call('ZREM', key .. ':closed', name)
    realm.closed = realm.closed - 1
  end
  redis.call('DEL', key .. ':m:' .. name, key .. ':s:' .. name)
  local facts = {tail = tail, floor = bottom, first = 0, bytes = 0, ttl = ttl or realm.ttl, window = window or realm.window,
    max_messages = most or realm.max_messages, created = now}
  facts.expires = now + facts.ttl
  redis.call('ZADD', key .. ':names', 0, name)
  redis.call('ZADD', key .. ':due', text(facts.expires), name)
  redis.call('ZADD', key .. ':stale', text(MAX_ID), name)
  realm.channels = realm.channels + 1
  save_realm(key, realm)
  return facts
end

-- Redis dropped the channel's messages: they had expired, or it needed the memory. Both keys go together.
local function forget(key, realm, name, facts)
  redis.call('DEL', key .. ':m:' .. name, key .. ':s:' .. name)
  facts.floor, facts.first = facts.tail + 1, 0
  weigh(realm, facts, -facts.bytes)
end

-- Drop messages: those beyond the count, and those with an id below `before`. True if the facts have changed. Who knows
-- how many there are says so.
local function trim(key, realm, name, facts, before, count)
  local messages, sizes = key .. ':m:' .. name, key .. ':s:' .. name
  if not count then
    count = redis.call('ZCARD', messages)
    if redis.call('LLEN', sizes) ~= count or (count == 0 and facts.first > 0) then
      forget(key, realm, name, facts)
      return true
    end
  end
  local excess = count - facts.max_messages
  if count == 0 or (excess <= 0 and facts.first >= before) then
    return false
  end
  local dropped, bytes, newest, first = 0, 0, 0, nil
  local upto = math.max(excess, 0)
  while not first and dropped < count do
    for _, entry in ipairs(redis.call('LRANGE', sizes, dropped, upto)) do
      local id, size = string.match(entry, '^(%d+) (%d+)$')
      id = tonumber(id)
      if dropped >= excess and id >= before then
        first = id
        break
      end
      dropped, bytes, newest = dropped + 1, bytes + tonumber(size), id
    end
    upto = upto + READ_AT_ONCE
  end
  redis.call('ZREMRANGEBYRANK', messages, 0, dropped - 1)
  redis.call('LTRIM', sizes, dropped, -1)
  facts.floor, facts.first = math.max(facts.floor, newest + 1), first or 0
  weigh(realm, facts, -bytes)
  return true
end

-- When the channel's oldest message becomes too old.
local function stales(facts)
  return facts.first > 0 and facts.first + facts.window + 1 or MAX_ID
end

-- A user who may only publish may not list channels, and gets an error, a table without elements: what is too old is
-- then left to the nodes' ticks.
local function stalest(key, ...)
  return redis.pcall('ZRANGE', key .. ':stale', ...)
end

-- Trim channels whose oldest message may be too old, until the realm is down to `bytes` or a number of them were looked
-- at. `known` are the facts that the caller has, by name.
local function shed(key, realm, now, bytes, known)
  if realm.bytes <= bytes then
    return
  end
  for _, name in ipairs(stalest(key, '-inf', text(now), 'BYSCORE', 'LIMIT', 0, SWEPT_AT_ONCE)) do
    local facts = known[name]
    if not facts then
      local written = redis.call('HMGET', key, 'c:' .. name)[1]
      facts = written and parse_facts(written)
    end
    if facts then
      if trim(key, realm, name, facts, now - facts.window) then
        save_facts(key, realm, name, facts)
      end
      redis.call('ZADD', key .. ':stale', text(stales(facts)), name)
    else
      redis.call('ZREM', key .. ':stale', name)
    end
    if realm.bytes <= bytes then
      return
    end
  end
end

-- Refuse a publication that would take the realm above its bytes, once what is too old has gone. What it would push out
-- of its channels, because they hold as many messages as they may, makes room, too.
local function make_room(key, realm, now, names, known, size)
  local limit = realm.realm_bytes - #names * size
  shed(key, realm, now, limit, known)
  local pushed = 0
  for _, name in ipairs(names) do
    local channel = known[name]
    if channel then
      if realm.bytes > limit and trim(key, realm, name, channel, now - channel.window) then
        save_facts(key, realm, name, channel)
      end
      local sizes = key .. ':s:' .. name
      local excess = redis.call('LLEN', sizes) + 1 - channel.max_messages
      if excess > 0 then
        for _, entry in ipairs(redis.call('LRANGE', sizes, 0, excess - 1)) do
          pushed = pushed + tonumber(string.match(entry, '%d+$'))
        end
      end
    end
  end
  if realm.bytes - pushed > limit then
    local next = stalest(key, 0, 0, 'WITHSCORES')[2]
    local wait = math.max(0, math.min(RETRY, (tonumber(next) or 0) - now))
    refuse('REALMFULL', text(math.max(1, math.ceil(wait / SECOND))) .. ' ' .. text(realm.bytes) ..
      ' bytes of data are cached in the realm; the limit is ' .. text(realm.realm_bytes))
  end
end

-- Publishing

-- What is made of the name of a channel of late: that it is a good one, its keys, its pub/sub channel, how it is shown.
local places, placed = {}, 0
local function find_place(key, name)
  local here = places[key]
  local place = here and here[name]
  if place then
    return place
  end
  check_name(name)
  if placed >= REMEMBERED then
    places, placed = {}, 0
  end
  placed = placed + 1
  place = {field = 'c:' .. name, messages = key .. ':m:' .. name, sizes = key .. ':s:' .. name, shown = cjson.encode({name})}
  places[key] = places[key] or {}
  places[key][name] = place
  return place
end

local function announcements(key, realm, name, place)
  if place.birth ~= realm.birth then
    place.birth, place.announced = realm.birth, pubsub(key, realm, 'a', name)
  end
  return place.announced
end

-- Store the message in one of its channels: the channel's facts, and the id of the message before. `written` is the id.
local function append(key, realm, name, place, known, now, id, written, message, size)
  local channel = known or add(key, realm, name, now)
  local messages, sizes = place.messages, place.sizes
  local entry = written .. ' ' .. size
  local count = redis.call('RPUSH', sizes, entry)
  redis.call('ZADD', messages, written, message)
  if redis.call('ZCARD', messages) ~= count or (count == 1 and channel.first > 0) then
    forget(key, realm, name, channel)
    count = redis.call('RPUSH', sizes, entry)
    redis.call('ZADD', messages, written, message)
  end
  if count == 1 then
    channel.first = id
    redis.call('ZADD', key .. ':stale', text(stales(channel)), name)
  end
  weigh(realm, channel, size)
  -- An eighth more than the window, so that old messages go many at once, and their keys are not put off to expire
  -- with every one, but whenever another eighth begins. (Ids that are ahead of the clock by more than the second that is
  -- added do not tell.)
  local eighth = math.max(1, math.floor(channel.window / 8))
  if count == 1 or id > now + SECOND / 2 or math.floor(channel.tail / eighth) < math.floor(id / eighth) then
    local kept = text(math.ceil((channel.window + eighth) / 1000) + 1000)
    redis.call('PEXPIRE', messages, kept)
    redis.call('PEXPIRE', sizes, kept)
  end
  local prev = channel.tail
  channel.tail = id
  if count > channel.max_messages or channel.first < now - channel.window - eighth then
    trim(key, realm, name, channel, now - channel.window, count)
  end
  channel.expires = now + channel.ttl
  return channel, text(prev)
end

-- Each name once, in the order in which they come first.
local function distinct(given)
  local names, seen = {}, {}
  for _, name in ipairs(given) do
    if not seen[name] then
      seen[name] = true
      names[#names + 1] = name
    end
  end
  return names
end

-- The channels that a publication names, each once, and what is made of their names.
local function resolve(key, given)
  if #given == 0 then
    refuse('INVALID', 'a publication names at least one channel')
  end
  local names, found = #given == 1 and given or distinct(given), {}
  for at, name in ipairs(names) do
    found[at] = find_place(key, name)
  end
  return names, found
end

-- What one call publishes: `known` are the facts of all channels it names (false: there is none), `changed` the names of
-- those it stores in, `places` theirs, and `told` is what to announce at the end, each after where.
local function begin(key, seen, names)
  local realm, facts, now = open(key, seen, names)
  refuse_in_doubt(now)
  local known = {}
  for at, name in ipairs(names) do
    known[name] = facts[at]
  end
  return {realm = realm, now = now, known = known, changed = {}, places = {}, told = {}}
end

-- Store one publication; its id, and whether it is a duplicate. What it changes is written by `commit`.
local function put(key, work, names, found, once, data)
  local realm, known, now = work.realm, work.known, work.now
  local most = math.min(realm.publish_channels, NAMES_AT_ONCE)
  if #names > most then
    refuse('TOOLARGE', 'a publication names at most ' .. text(most) .. ' channels')
  end
  data = check_data(data, realm.message_bytes)
  local shown = #names == 1 and found[1].shown or cjson.encode(names)
  local memo
  if once ~= '' then
    memo = redis.sha1hex(shown .. data)
    local id, digest = string.match(redis.call('GET', key .. ':k:' .. once) or '', '^(%d+) (%x+)$')
    if id and digest ~= memo then
      refuse('KEYREUSED', 'the idempotency key was used for a different publication')
    end
    if id then
      return tonumber(id), true
    end
  end
  for _, name in ipairs(names) do
    if not known[name] and not comes_into_being(realm, name) then
      refuse('NOCHANNEL', name)
    end
  end
  if realm.bytes + #names * #data > realm.realm_bytes then
    make_room(key, realm, now, names, known, #data)
  end
  local id = math.max(now, realm.last + 1)
  realm.last = id
  local written = text(id)
  local message = '[' .. written .. ',' .. shown .. ',' .. data .. ']'
  local changed, places, told = work.changed, work.places, work.told
  for at, name in ipairs(names) do
    local place = found[at]
    if not places[name] then
      places[name] = place
      changed[#changed + 1] = name
    end
    local facts, prev = append(key, realm, name, place, known[name], now, id, written, message, #data)
    known[name] = facts
    told[#told + 1] = announcements(key, realm, name, place)
    told[#told + 1] = prev .. ' ' .. message
  end
  if memo and realm.idempotency > 0 then
    redis.call('SET', key .. ':k:' .. once, written .. ' ' .. memo, 'PX', text(math.ceil(realm.idempotency / 1000)))
  end
  return id, false
end

local function commit(key, work)
  local realm, known, changed, told = work.realm, work.known, work.changed, work.told
  if #changed == 0 then
    return
  end
  local saved = {'last', text(realm.last), 'bytes', text(realm.bytes)}
  for _, name in ipairs(changed) do
    if known[name] then
      saved[#saved + 1] = work.places[name].field
      saved[#saved + 1] = show_facts(known[name])
      keep_facts(saved[#saved], known[name])
    end
  end
  redis.call('HSET', key, unpack(saved))
  keep_realm(realm.written, realm)
  for at = 1, #told, 2 do
    redis.call('SPUBLISH', told[at], told[at + 1])
  end
end

-- -> id, whether it is a duplicate, realm
local function publish_one(key, seen, once, data, given)
  local names, found = resolve(key, given)
  local work = begin(key, seen, #names <= NAMES_AT_ONCE and names or {})
  local id, duplicate = put(key, work, names, found, once, data)
  commit(key, work)
  return id, duplicate, work.realm
end

local function from(args, at)
  local rest = {}
  for index = at, #args do
    rest[#rest + 1] = args[index]
  end
  return rest
end

-- DATA CHANNEL [CHANNEL ...] -> id
local function publish(key, args)
  return (publish_one(key, 0, '', args[1] or '', from(args, 2)))
end

-- KEY DATA CHANNEL [CHANNEL ...] -> id; the same KEY within the idempotency window stores nothing and gets the same id
local function publish_once(key, args)
  if (args[1] or '') == '' or #args[1] > 1020 then
    refuse('INVALID', 'an idempotency key is 1 to 255 characters')
  end
  return (publish_one(key, 0, args[1], args[2] or '', from(args, 3)))
end

-- SEEN KEY-OR-EMPTY DATA CHANNEL [CHANNEL ...] -> {id, whether it is a duplicate, origin}
local function store(key, args)
  local id, duplicate, realm = publish_one(key, args[1], args[2], args[3], from(args, 4))
  return {id, duplicate and 1 or 0, origin(realm)}
end

local function put_item(key, work, item)
  local names, found = resolve(key, item.given)
  return put(key, work, names, found, item.once, item.data)
end

-- SEEN, for each publication KEY-OR-EMPTY DATA COUNT CHANNEL [CHANNEL ...] -> {origin, for each its id, {id} if it is a
-- duplicate, or `CODE SENTENCE`}. Several in order, of which one that is refused changes nothing for the others, for
-- little more than the commands that store them.
local function store_all(key, args)
  local items, named = {}, {}
  local at = 2
  while args[at] do
    local last = at + 2 + whole(args[at + 2], 0)
    local item = {once = args[at], data = args[at + 1], given = {}}
    for index = at + 3, last do
      local name = args[index] or refuse('INVALID', 'there are fewer channels than a count says')
      item.given[#item.given + 1] = name
      named[#named + 1] = name
    end
    items[#items + 1] = item
    at = last + 1
  end
  local names = distinct(named)
  if #names > NAMES_AT_ONCE then
    refuse('TOOLARGE', 'the publications of a call name at most ' .. NAMES_AT_ONCE .. ' channels')
  end
  local work = begin(key, args[1], names)
  local shown = {origin(work.realm)}
  for _, item in ipairs(items) do
    local good, id, duplicate = pcall(put_item, key, work, item)
    if good then
      shown[#shown + 1] = duplicate and {id} or id
    else
      shown[#shown + 1] = sentence(id)
    end
  end
  commit(key, work)
  return shown
end

-- Channels

local function describe(key, realm, name, facts, now)
  if trim(key, realm, name, facts, now - facts.window) then
    save_facts(key, realm, name, facts)
  end
  local count = redis.call('ZCARD', key .. ':m:' .. name)
  return {name, text(facts.created), text(facts.expires), text(facts.ttl), text(facts.window),
    text(facts.max_messages), count, text(facts.first), text(facts.first > 0 and facts.tail or 0)}
end

local function known(key, seen, name)
  check_name(name)
  local realm, facts, now = open(key, seen, {name})
  if not facts[1] then
    refuse('NOCHANNEL', name)
  end
  return realm, facts[1], now
end

local function option(given, least)
  return given ~= '' and whole(given, least) or nil
end

-- SEEN NAME-OR-EMPTY TTL WINDOW MAX_MESSAGES (microseconds, each may be empty) -> description
local function create(key, args)
  local name = args[2]
  local ttl, window, most = option(args[3], 0), option(args[4], 0), option(args[5], 1)
  local realm, facts, now = open(key, args[1], {name})
  refuse_in_doubt(now)
  if name == '' then
    realm.last = math.max(now, realm.last + 1)
    redis.call('HSET', key, 'last', text(realm.last))
    name = text(realm.last)
  else
    check_name(name)
    if is_integer(name) then
      refuse('INVALID', 'a name of digits only is an integer channel, and those are handed out')
    end
    if facts[1] then
      refuse('EXISTS', name)
    end
  end
  local channel = add(key, realm, name, now, ttl, window, most)
  save_facts(key, realm, name, channel)
  redis.call('SPUBLISH', pubsub(key, realm, 'a', name), 'made')
  return describe(key, realm, name, channel, now)
end

-- SEEN NAME TTL-OR-EMPTY -> description
local function renew(key, args)
  local ttl = option(args[3], 0)
  local realm, facts, now = known(key, args[1], args[2])
  refuse_in_doubt(now)
  facts.ttl = ttl or facts.ttl
  facts.expires = now + facts.ttl
  local due = tonumber(redis.call('ZSCORE', key .. ':due', args[2]) or facts.expires)
  redis.call('ZADD', key .. ':due', text(math.min(due, facts.expires)), args[2])
  save_facts(key, realm, args[2], facts)
  return describe(key, realm, args[2], facts, now)
end

local function finish(key, realm, name, facts, now)
  redis.call('DEL', key .. ':m:' .. name, key .. ':s:' .. name)
  weigh(realm, facts, -facts.bytes)
  redis.call('HDEL', key, 'c:' .. name)
  redis.call('HSET', key, 'bytes', text(realm.bytes))
  redis.call('ZREM', key .. ':names', name)
  redis.call('ZREM', key .. ':due', name)
  redis.call('ZREM', key .. ':stale', name)
  realm.channels = realm.channels - 1
  if facts.tail > 0 and not is_integer(name) then
    redis.call('ZADD', key .. ':closed', text(facts.tail), name)
    realm.closed = realm.closed + 1
    if realm.closed > CLOSED_REMEMBERED then
      local forgotten = redis.call('ZPOPMIN', key .. ':closed')
      realm.closed = realm.closed - 1
      realm.unknown = math.max(realm.unknown, tonumber(forgotten[2]) + 1)
    end
  end
  save_realm(key, realm)
  redis.call('SPUBLISH', pubsub(key, realm, 'a', name), 'closed ' .. text(position(key, realm, now)))
end

-- SEEN NAME
local function close(key, args)
  local realm, facts, now = known(key, args[1], args[2])
  refuse_in_doubt(now)
  finish(key, realm, args[2], facts, now)
  return redis.status_reply('OK')
end

-- SEEN NAME -> description
local function look(key, args)
  local realm, facts, now = known(key, args[1], args[2])
  return describe(key, realm, args[2], facts, now)
end

-- SEEN AFTER LIMIT -> descriptions, by name
local function list(key, args)
  local names = redis.call('ZRANGE', key .. ':names', args[2] == '' and '-' or '(' .. args[2], '+', 'BYLEX', 'LIMIT', 0,
    args[3])
  local realm, facts, now = open(key, args[1], names)
  local shown = {}
  for at, name in ipairs(names) do
    if facts[at] then
      shown[#shown + 1] = describe(key, realm, name, facts[at], now)
    end
  end
  return shown
end

-- For nodes

local function tell(key, node, realm, at, token, more)
  local said = {text(at), text(realm.floor), origin(realm), token .. more}
  redis.call('SPUBLISH', pubsub(key, realm, 'n', node), table.concat(said, ' '))
end

-- SEEN NODE TOKEN [CHANNEL START ...] -> {position, origin, for each channel {tail, floor, whole, window, max_messages,
-- messages} or false if it would have to be created}. What the reply says is complete below the position, and the
-- node's own channel hears of the position after everything that was announced below it.
local function read(key, args)
  local names, starts = {}, {}
  for at = 4, #args, 2 do
    names[#names + 1] = args[at]
    starts[#starts + 1] = whole(args[at + 1], 0)
  end
  local realm, facts, now = open(key, args[1], names)
  local histories = {}
  for at, name in ipairs(names) do
    local channel = facts[at]
    if channel then
      if trim(key, realm, name, channel, now - channel.window) then
        save_facts(key, realm, name, channel)
      end
      local bottom = math.max(channel.floor, realm.floor)
      local whole = starts[at] <= bottom
      histories[at] = {text(channel.tail), text(whole and bottom or starts[at]), whole and 1 or 0,
        text(channel.window), text(channel.max_messages),
        redis.call('ZRANGE', key .. ':m:' .. name, whole and '-inf' or text(starts[at]), '+inf', 'BYSCORE')}
    elseif comes_into_being(realm, name) then
      local tail, bottom = unknown(key, realm, name)
      histories[at] = {text(tail), text(math.max(bottom, realm.floor)), 1, text(realm.window), text(realm.max_messages), {}}
    else
      histories[at] = false
    end
  end
  local at = position(key, realm, now)
  tell(key, args[2], realm, at, args[3], '')
  return {text(at), origin(realm), histories}
end

local function restore_indexes(key, realm)
  local names, due, stale = key .. ':names', key .. ':due', key .. ':stale'
  local complete = true
  for _, index in ipairs({names, due, stale}) do
    complete = complete and redis.call('ZCARD', index) == realm.channels
  end
  if complete then
    return
  end
  redis.call('DEL', names, due, stale)
  realm.channels = 0
  for _, field in ipairs(redis.call('HKEYS', key)) do
    if string.sub(field, 1, 2) == 'c:' then
      redis.call('ZADD', names, 0, string.sub(field, 3))
      redis.call('ZADD', due, 0, string.sub(field, 3))
      redis.call('ZADD', stale, 0, string.sub(field, 3))
      realm.channels = realm.channels + 1
    end
  end
  save_realm(key, realm)
end

local function sweep(key, realm, now)
  local names = redis.call('ZRANGE', key .. ':due', '-inf', text(now), 'BYSCORE', 'LIMIT', 0, SWEPT_AT_ONCE)
  for _, name in ipairs(names) do
    local written = redis.call('HGET', key, 'c:' .. name)
    local facts = written and parse_facts(written)
    if not facts then
      redis.call('ZREM', key .. ':due', name)
    elseif facts.expires <= now then
      finish(key, realm, name, facts, now)
    else
      redis.call('ZADD', key .. ':due', text(facts.expires), name)
    end
  end
end

-- SEEN NODE TOKEN ABOUT [CHANNEL ...] -> {position, origin}. The node's heartbeat, and its proof that it hears: its own
-- channel is told the position, and the tails of the channels named, behind everything that was announced before.
local function tick(key, args)
  local audited = from(args, 5)
  local realm, facts, now = open(key, args[1], audited)
  if realm.kept == '1' and not string.find(redis.call('INFO', 'replication'), 'connected_slaves:0') then
    realm.kept = '0'
    save_realm(key, realm)
  end
  redis.call('HSET', key .. ':nodes', args[2], text(now) .. ' ' .. args[4])
  restore_indexes(key, realm)
  sweep(key, realm, now)
  shed(key, realm, now, realm.realm_bytes / 2, {})
  local tails = {''}
  for at, name in ipairs(audited) do
    local hex = string.gsub(name, '.', function(byte) return string.format('%02x', string.byte(byte)) end)
    tails[#tails + 1] = hex .. ' ' .. (facts[at] and text(facts[at].tail) or '0')
  end
  local at = position(key, realm, now)
  tell(key, args[2], realm, at, args[3], table.concat(tails, ' '))
  return {text(at), origin(realm)}
end

-- SEEN ORIGIN SEEN-THERE. Whoever knows of ids that another server has given says so here. ORIGIN is the server it knows
-- them from, and SEEN-THERE the highest: if that is above the last id before this run, the two served at the same time (a
-- master that was cut off), and what the other one acknowledged is not here.
local function compare(key, args)
  local there = whole(args[3], 0)
  local realm, _, now = open(key, args[1], {})
  if args[2] ~= '' and args[2] ~= origin(realm) and there > realm.since then
    lose(key, realm, now, tonumber(args[1]))
  end
  return realm, now
end

local function witness(key, args)
  local realm, now = compare(key, args)
  return {text(position(key, realm, now)), origin(realm)}
end

-- SEEN ORIGIN SEEN-THERE KEPT TTL WINDOW MAX_MESSAGES IDEMPOTENCY IMPLICIT MESSAGE_BYTES PUBLISH_CHANNELS REALM_BYTES ->
-- {position, origin}. A node begins, or begins again. One of version 1 says nothing of REALM_BYTES: the realm's stay.
-- KEPT: whether this server keeps every acknowledged write over a restart, and has no replica that could take its place.
local function attach(key, args)
  local numbers = {}
  for at = 4, args[12] and 12 or 11 do
    numbers[at] = whole(args[at], 0)
  end
  local realm, now = compare(key, args)
  realm.kept = numbers[4] == 1 and '1' or '0'
  realm.ttl, realm.window, realm.max_messages = numbers[5], numbers[6], numbers[7]
  realm.idempotency, realm.implicit = numbers[8], numbers[9]
  realm.message_bytes, realm.publish_channels = numbers[10], numbers[11]
  realm.realm_bytes = numbers[12] or realm.realm_bytes
  save_realm(key, realm)
  return {text(position(key, realm, now)), origin(realm)}
end

-- NODE: it has stopped in good order
local function leave(key, args)
  return redis.call('HDEL', key .. ':nodes', args[1])
end

-- -> {now, name, `LAST-HEARD ABOUT`, ...}
local function nodes(key)
  local now = clock()
  local shown = {text(now)}
  local found = redis.call('HGETALL', key .. ':nodes')
  for at = 1, #found, 2 do
    if tonumber(string.match(found[at + 1], '^%d+')) < now - NODE_FORGOTTEN then
      redis.call('HDEL', key .. ':nodes', found[at])
    else
      shown[#shown + 1] = found[at]
      shown[#shown + 1] = found[at + 1]
    end
  end
  return shown
end

local function version()
  return VERSION
end

-- What only takes memory away, or must work when none is left, may run when the server is out of it.
local function register(name, callback, flags)
  register_function({function_name = 'pushup_' .. name, callback = guarded(callback), flags = flags})
end

register('publish', publish, {})
register('publish_once', publish_once, {})
register('store', store, {})
register('store_all', store_all, {})
register('create', create, {})
register('renew', renew, {'allow-oom'})
register('close', close, {'allow-oom'})
register('describe', look, {'allow-oom'})
register('list', list, {'allow-oom'})
register('read', read, {'allow-oom'})
register('tick', tick, {'allow-oom'})
register('attach', attach, {'allow-oom'})
register('witness', witness, {'allow-oom'})
register('leave', leave, {'allow-oom'})
register('nodes', nodes, {'allow-oom'})
register_function({function_name = 'pushup_version', callback = version, flags = {'no-writes'}})
