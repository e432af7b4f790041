'use strict';
// The JavaScript SDK of npm (kubemq-js), each case in a process of its own: `SCRIPT --list`, or `SCRIPT ADDRESS CASE`.

const assert = require('node:assert/strict');
const { setTimeout: sleep } = require('node:timers/promises');
const {
  CommandsClient, EventsClient, EventsStoreClient, EventStoreType, QueriesClient, QueuesClient, Utils,
} = require('kubemq-js');

const address = process.argv[2];
const options = (clientId = 'javascript') => ({ address, clientId, reconnectInterval: 200 });
const text = (message) => Utils.bytesToString(message.body);
const texts = (messages) => messages.map(text);
// No tags: this SDK fails on every map that it is given for them, before it sends anything.
const body = (value) => Utils.stringToBytes(value);
const cases = {};

/** What a probe finds, once it is something; what the SDK says only by callbacks has to be asked for. */
async function until(probe, about, pause = 20) {
  for (const end = Date.now() + 40_000; Date.now() < end; await sleep(pause)) {
    const found = await probe();
    if (found) return found;
  }
  throw new Error(`${about}: nothing within 40 s`);
}

// Queues

const queues = (clientId) => new QueuesClient(options(clientId));
const message = (value, more = {}) => ({ channel: 'orders', body: body(value), metadata: 'about', ...more });

async function send(client, values, more) {
  for (const value of values) {
    const sent = await client.send(message(value, more));
    assert.deepEqual([sent.isError, sent.error], [false, '']);
  }
}

async function pull(client, most = 10, channel = 'orders', wait = 1) {
  const found = await client.pull({ channel, maxNumberOfMessages: most, waitTimeoutSeconds: wait });
  assert.deepEqual([found.isError, found.error], [false, '']);
  return found.messages;
}

/** A transaction, its message and the promise of its end. */
async function transaction(client, visibility = 60, wait = 20) {
  let held, failed, told;
  const answered = new Promise((resolve) => { told = resolve; });
  const request = { channel: 'orders', visibilitySeconds: visibility, waitTimeoutSeconds: wait };
  const ended = client.transaction(request, (error, received) => {
    if (received) held = received;
    if (error) failed = error;
    if (error || received) told();
  });
  await answered;
  return { held, ended, failure: () => failed };
}

cases.ping = async () => {
  const found = await queues().ping();
  assert.match(found.version, /^2\./);
  assert.ok(found.host && found.serverStartTime > 1_600_000_000, JSON.stringify(found));
};

cases.send_and_receive = async () => {
  const client = queues();
  const sent = await client.send(message('a'));
  assert.ok(sent.id && !sent.isError && Math.abs(sent.sentAt / 1e6 - Date.now()) < 60_000, JSON.stringify(sent));
  await send(client, ['b', 'c']);
  const found = await pull(client, 2);
  assert.deepEqual(texts(found), ['a', 'b']);
  const [first] = found;
  assert.deepEqual([first.id, first.channel, first.metadata], [sent.id, 'orders', 'about']);
  assert.deepEqual([first.attributes.sequence, first.attributes.receiveCount, first.attributes.reRouted], [1, 1, false]);
  assert.deepEqual(texts(await pull(client)), ['c']);
  assert.deepEqual(texts(await pull(client)), [], 'an empty queue');
};

cases.batch = async () => {
  const client = queues();
  const values = Array.from({ length: 20 }, (_, number) => `${number}`);
  const sent = await client.batch(values.map((value) => message(value)));
  assert.deepEqual(sent.map((result) => result.error), values.map(() => ''));
  assert.deepEqual(texts(await pull(client, 100)), values);
};

cases.peek = async () => {
  const client = queues();
  await send(client, ['a', 'b']);
  for (let time = 0; time < 2; time += 1) {
    const found = await client.peek({ channel: 'orders', maxNumberOfMessages: 10, waitTimeoutSeconds: 1 });
    assert.deepEqual([texts(found.messages), found.isPeek], [['a', 'b'], true]);
  }
  assert.deepEqual(texts(await pull(client)), ['a', 'b'], 'after the peeks');
};

cases.ack_all = async () => {
  const client = queues();
  await send(client, ['a', 'b', 'c']);
  const acked = () => client.ackAll({ channel: 'orders', waitTimeoutSeconds: 1 });
  assert.deepEqual([(await acked()).affectedMessages, (await acked()).affectedMessages], [3, 0]);
};

cases.expiration = async () => {
  const client = queues();
  await send(client, ['short'], { policy: { expirationSeconds: 1 } });
  await send(client, ['long'], { policy: { expirationSeconds: 600 } });
  await sleep(1200);
  assert.deepEqual(texts(await pull(client)), ['long']);
};

cases.delay = async () => {
  const client = queues();
  const start = Date.now();
  await send(client, ['late'], { policy: { delaySeconds: 20 } });
  await send(client, ['now']);
  assert.deepEqual(texts(await pull(client)), ['now']);
  assert.deepEqual(texts(await pull(client, 10, 'orders', 40)), ['late']);
  assert.ok(Date.now() - start >= 19_900, 'when it was due');
};

cases.dead_letter = async () => {
  const client = queues();
  await send(client, ['bad'], { policy: { maxReceiveCount: 3, maxReceiveQueue: 'letters' } });
  for (let attempt = 1; attempt <= 3; attempt += 1) {
    const { held, ended } = await transaction(client);
    assert.equal(held.message.attributes.receiveCount, attempt);
    await held.reject();
    await ended;
  }
  const [letter] = await pull(client, 10, 'letters');
  const { reRouted, reRoutedFromQueue, receiveCount } = letter.attributes;
  assert.deepEqual([text(letter), reRouted, reRoutedFromQueue, receiveCount], ['bad', true, 'orders', 1]);
  assert.deepEqual(texts(await pull(client)), [], 'delivered three times, never a fourth');
};

cases.transaction_ack = async () => {
  const client = queues();
  await send(client, ['a', 'b']);
  for (const value of ['a', 'b']) {
    const { held, ended } = await transaction(client);
    assert.equal(text(held.message), value);
    await held.ack();
    await ended;
  }
  const { held, ended, failure } = await transaction(client, 60, 1);
  assert.equal(held, undefined);
  assert.match(failure().message, /138/);
  await ended;
};

cases.transaction_reject = async () => {
  const client = queues();
  await send(client, ['a', 'b']);
  const { held, ended } = await transaction(client);
  await held.reject();
  await ended;
  const found = await pull(client);
  assert.deepEqual(found.map((one) => [text(one), one.attributes.receiveCount]), [['b', 1], ['a', 2]]);
};

cases.extend_visibility = async () => {
  const client = queues();
  await send(client, ['slow']);
  const { held, ended } = await transaction(client, 20);
  await held.extendVisibility(60);
  await sleep(21_000);
  assert.deepEqual(texts(await pull(queues('other'))), [], 'held, so nobody else sees it');
  await held.ack();
  await ended;
  assert.deepEqual(texts(await pull(client)), []);
};

cases.visibility_ends = async () => {
  const client = queues();
  await send(client, ['slow']);
  const { ended, failure } = await transaction(client, 1);
  await ended;
  assert.match(failure().message, /129/);
  const [again] = await pull(client, 10, 'orders', 20);
  assert.deepEqual([text(again), again.attributes.receiveCount], ['slow', 2]);
};

cases.resend_to_another_queue = async () => {
  const client = queues();
  await send(client, ['moved']);
  const { held, ended } = await transaction(client);
  await held.resendToChannel('other');
  await ended;
  assert.deepEqual(texts(await pull(client, 10, 'other')), ['moved']);
  assert.deepEqual(texts(await pull(client)), []);
};

cases.resend_modified = async () => {
  const client = queues();
  await send(client, ['before']);
  const { held, ended } = await transaction(client);
  await held.resendNewMessage(message('after', { channel: 'other', metadata: 'changed' }));
  await ended;
  const [found] = await pull(client, 10, 'other');
  assert.deepEqual([text(found), found.metadata], ['after', 'changed']);
  assert.deepEqual(texts(await pull(client)), []);
};

cases.subscribed_queue = async () => {
  const client = queues();
  const seen = [];
  const request = { channel: 'orders', maxNumberOfMessages: 10, waitTimeoutSeconds: 1 };
  const subscription = await client.subscribe(request, (error, response) => {
    assert.ifError(error);
    seen.push(...texts(response.messages));
  });
  await send(client, ['a', 'b', 'c']);
  await until(() => seen.length === 3, 'the messages');
  subscription.unsubscribe();
  assert.deepEqual(seen, ['a', 'b', 'c']);
};

cases.transaction_stream = async () => {
  const client = queues();
  const seen = [];
  const request = { channel: 'orders', visibilitySeconds: 60, waitTimeoutSeconds: 20 };
  const subscription = await client.transactionStream(request, (error, received) => {
    if (!received) return;
    seen.push(text(received.message));
    received.ack();
  });
  await send(client, ['a', 'b', 'c']);
  await until(() => seen.length === 3, 'the messages');
  subscription.unsubscribe();
  assert.deepEqual(seen, ['a', 'b', 'c']);
};

/** Of this SDK's subscriptions only those of queues connect again. */
cases.subscribed_queue_goes_on_after_a_crash = async () => {
  const client = queues();
  const seen = [];
  const request = { channel: 'orders', maxNumberOfMessages: 10, waitTimeoutSeconds: 20 };
  await client.subscribe(request, (error, response) => { if (response) seen.push(...texts(response.messages)); });
  await send(client, ['before']);
  await until(() => seen.length === 1, 'the first message');
  await client.send(message('kept', { channel: 'other' }));
  process.kill(Number(process.env.BROKER_PID), 'SIGKILL');
  await until(async () => {
    try {
      return !(await client.send(message('after'))).isError;
    } catch {
      return false;
    }
  }, 'the broker', 200);
  await until(() => seen.length > 1, 'the next message');
  assert.deepEqual([new Set(seen), texts(await pull(client, 10, 'other'))], [new Set(['before', 'after']), ['kept']]);
};

cases.refusals = async () => {
  const sent = await queues().send(message('a', { channel: 'a queue' }));
  assert.ok(sent.isError && /120/.test(sent.error), JSON.stringify(sent));
};

// Events

/** A subscription, and what it got. It is not confirmed: it listens once a probe has come. */
async function listen(client, request, probe) {
  const seen = [];
  const errors = [];
  const subscription = await client.subscribe(request, (error, event) => (error ? errors.push(error) : seen.push(event)));
  const listener = { subscription, errors, seen: () => seen.filter((event) => text(event) !== 'probe') };
  if (probe) {
    const probed = async () => {
      await client.send({ channel: probe, body: body('probe') });
      return seen.length > 0;
    };
    await until(probed, `the subscription of ${request.channel}`, 50);
  }
  return listener;
}

const event = (channel, value) => ({ channel, body: body(value), metadata: 'about' });

cases.events = async () => {
  const client = new EventsClient(options());
  const listener = await listen(client, { channel: 'news' }, 'news');
  for (const [channel, value] of [['news', 'a'], ['news.other', 'b'], ['news', 'c']]) {
    assert.equal((await client.send(event(channel, value))).sent, true);
  }
  await until(() => listener.seen().length === 2, 'the events');
  assert.deepEqual(texts(listener.seen()), ['a', 'c']);
  const [first] = listener.seen();
  assert.deepEqual([first.channel, first.metadata], ['news', 'about']);
};

cases.event_stream = async () => {
  const client = new EventsClient(options());
  const listener = await listen(client, { channel: 'news' }, 'news');
  const errors = [];
  const stream = await client.stream((error) => { if (error) errors.push(error); });
  const values = Array.from({ length: 20 }, (_, number) => `${number}`);
  values.forEach((value) => stream.write(event('news', value)));
  stream.end();
  await until(() => listener.seen().length === 20, 'the events');
  assert.deepEqual([texts(listener.seen()), errors], [values, []]);
};

cases.event_groups = async () => {
  const client = new EventsClient(options());
  const members = [];
  for (let member = 0; member < 2; member += 1) members.push(await listen(client, { channel: 'work', group: 'billing' }, 'work'));
  const values = Array.from({ length: 50 }, (_, number) => `${number}`);
  for (const value of values) await client.send(event('work', value));
  await until(() => members[0].seen().length + members[1].seen().length >= 50, 'the events');
  const shared = texts(members.flatMap((member) => member.seen()));
  assert.deepEqual(shared.sort(), values.sort(), 'each event once in the group');
};

cases.event_wildcards = async () => {
  const client = new EventsClient(options());
  const one = await listen(client, { channel: 'eu.*' }, 'eu.x');
  const more = await listen(client, { channel: 'eu.>' }, 'eu.x');
  for (const channel of ['eu.a', 'eu.a.b', 'us.a', 'eu.c']) await client.send(event(channel, channel));
  await until(() => one.seen().length === 2 && more.seen().length === 3, 'the events');
  assert.deepEqual([texts(one.seen()), texts(more.seen())], [['eu.a', 'eu.c'], ['eu.a', 'eu.a.b', 'eu.c']]);
};

cases.events_store = async () => {
  const client = new EventsStoreClient(options());
  const sent = await client.send(event('log', 'a'));
  assert.deepEqual([sent.sent, sent.error], [true, '']);
  const listener = await listen(client, { channel: 'log', requestType: EventStoreType.StartFromFirst });
  await client.send(event('log', 'b'));
  await until(() => listener.seen().length === 2, 'the events');
  assert.deepEqual(listener.seen().map((one) => [one.sequence, text(one)]), [[1, 'a'], [2, 'b']]);
};

cases.events_store_stream = async () => {
  const client = new EventsStoreClient(options());
  const answers = [];
  const stream = await client.stream((error, answer) => { if (error || answer) answers.push([error, answer && answer.sent]); });
  const closed = new Promise((resolve) => { stream.onClose.on(resolve); });
  for (let number = 0; number < 10; number += 1) stream.write(event('log', `${number}`));
  stream.end();
  await closed;
  assert.deepEqual(answers, Array(10).fill([null, true]), 'every stored event is answered');
};

cases.events_store_start_positions = async () => {
  const sender = new EventsStoreClient(options('sender'));
  for (const value of ['1', '2', '3']) await sender.send(event('log', value));
  await sleep(32_000);
  const between = Date.now() - 500;
  for (const value of ['4', '5']) await sender.send(event('log', value));
  const positions = [
    // First: it counts from now.
    ['delta', { requestType: EventStoreType.StartAtTimeDelta, requestTypeValue: 25 }, ['4', '5']],
    ['first', { requestType: EventStoreType.StartFromFirst }, ['1', '2', '3', '4', '5']],
    ['last', { requestType: EventStoreType.StartFromLast }, ['5']],
    ['sequence', { requestType: EventStoreType.StartAtSequence, requestTypeValue: 4 }, ['4', '5']],
    ['time in seconds', { requestType: EventStoreType.StartAtTime, requestTypeValue: Math.floor(between / 1000) }, ['4', '5']],
    ['time in nanoseconds', { requestType: EventStoreType.StartAtTime, requestTypeValue: between * 1e6 }, ['4', '5']],
  ];
  const listeners = [];
  for (const [name, request, found] of positions) {
    const clientId = `reader-${listeners.length}`;
    const listener = await listen(new EventsStoreClient(options(clientId)), { channel: 'log', ...request });
    await until(() => listener.seen().length >= found.length, `${name}: ${listener.errors}`);
    assert.deepEqual(texts(listener.seen()), found, name);
    listeners.push([name, listener, found]);
  }
  const newOnly = await listen(new EventsStoreClient(options('new')), { channel: 'log', requestType: EventStoreType.StartNewOnly });
  // Which of these is the first one it sees depends on when it began to listen; from there on it sees all.
  const sent = [];
  const next = async () => {
    sent.push(`new ${sent.length}`);
    await sender.send(event('log', sent.at(-1)));
    return newOnly.seen().length > 0;
  };
  await until(next, 'new only', 100);
  sent.push('end');
  await sender.send(event('log', 'end'));
  const complete = (listener) => () => texts(listener.seen()).at(-1) === 'end';
  await until(complete(newOnly), 'the last event');
  assert.deepEqual(texts(newOnly.seen()), sent.slice(-newOnly.seen().length), 'new only');
  for (const [name, listener, found] of listeners) {
    await until(complete(listener), `live events of ${name}`);
    assert.deepEqual(texts(listener.seen()), [...found, ...sent], `${name}, then live without gap or repetition`);
  }
};

// Commands and queries

/** Asks until somebody answers: a subscription is not confirmed. */
const ready = (client) => until(async () => {
  try {
    return await client.send({ channel: 'ask', body: body('probe'), timeout: 1000 });
  } catch (error) {
    assert.match(error.message, /301/);
    return false;
  }
}, 'a responder');

async function respond(client, answer, group = '') {
  const seen = [];
  await client.subscribe({ channel: 'ask', group }, async (error, request) => {
    if (error) return;
    seen.push(text(request));
    await client.response({ id: request.id, replyChannel: request.replyChannel, clientId: 'responder', timestamp: Date.now(), ...await answer(text(request), seen) });
  });
  return seen;
}

const ask = (client, value, more = {}) => client.send({ channel: 'ask', body: body(value), metadata: 'about', timeout: 30_000, ...more });

cases.commands = async () => {
  const client = new CommandsClient(options());
  await respond(client, (value) => (value === 'bad' ? { executed: false, error: 'no' } : { executed: true, error: '' }));
  await ready(client);
  const [good, bad] = [await ask(client, 'good'), await ask(client, 'bad')];
  assert.deepEqual([good.executed, good.error, good.clientId], [true, '', 'responder']);
  assert.deepEqual([bad.executed, bad.error], [false, 'no']);
};

cases.command_timeout = async () => {
  const start = Date.now();
  await assert.rejects(ask(new CommandsClient(options()), 'nobody', { timeout: 500 }), /Error 301/);
  assert.ok(Date.now() - start >= 450, 'after the time-out, not before');
};

cases.queries = async () => {
  const client = new QueriesClient(options());
  await respond(client, (value) => ({ executed: true, error: '', body: body(value.toUpperCase()), metadata: 'answered' }));
  await ready(client);
  const found = await ask(client, 'question');
  assert.deepEqual([found.executed, text(found), found.metadata], [true, 'QUESTION', 'answered']);
};

cases.query_timeout = async () => {
  const client = new QueriesClient(options());
  await respond(client, async (value) => {
    if (value !== 'probe') await sleep(12_000);
    return { executed: true, error: '', body: body('late') };
  });
  await ready(client);
  await assert.rejects(ask(client, 'slow', { timeout: 500 }), /Error 301/);
};

// This SDK does not show whether an answer comes from the cache: the calls of the responder are counted.
cases.query_cache = async () => {
  const client = new QueriesClient(options());
  const seen = await respond(client, (_, requests) => ({ executed: true, error: '', body: body(`${requests.length}`) }));
  await ready(client);
  const cached = () => ask(client, 'question', { cacheKey: 'k', cacheTTL: 30 });
  const first = await cached();
  const before = seen.length;
  const second = await cached();
  assert.deepEqual([text(second), seen.length], [text(first), before], 'without asking again');
  await sleep(31_000);
  const late = await cached();
  assert.deepEqual([seen.length, text(late) !== text(first)], [before + 1, true], 'its time is over');
};

async function main() {
  if (process.argv[2] === '--list') {
    console.log(Object.keys(cases).join('\n'));
    return;
  }
  await cases[process.argv[3]]();
}

main().then(() => process.exit(0), (error) => {
  console.error(error);
  process.exit(1);
});
