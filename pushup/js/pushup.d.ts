/** Types of the JavaScript client of PushUp. */

export type Transport = "poll" | "events" | "ws" | "auto";

/** A cursor, or `latest`: from now on. 0 is all that is cached. */
export type Start = number | "latest";

/** An integer channel may be given as a number or as its digits. */
export type Channels = string | number | ReadonlyArray<string | number>;

export interface Options {
  /** Where the server is, also with a path. The page's own origin unless named; Node.js has to name it. */
  url?: string;
  /** A realm other than the root one. */
  realm?: string;
  /** Shown as `Authorization: Bearer`. A function is asked again when its token has expired. */
  token?: string | (() => string | Promise<string>);
  /** `poll` unless named. `auto` tries WebSocket, then events, then polls. The others do not fall back. */
  transport?: Transport;
  /** Whether one tab asks for all tabs of the origin with the same server and rights. True unless named. */
  share?: boolean;
  /** Where cursors are kept over a reload, such as `sessionStorage`. */
  storage?: Pick<Storage, "getItem" | "setItem"> | null;
  /** Of `fetch`; `include` for a token in a cookie of another origin's server. */
  credentials?: "omit" | "same-origin" | "include";
}

export interface Message<T = unknown> {
  readonly id: number;
  readonly channels: ReadonlyArray<string | number>;
  readonly data: T;
}

/** Messages from `from` on may be missing. */
export interface Gap {
  readonly from: number;
  readonly next: number;
}

/** `waiting` and `offline`: the last request failed, and another one will be made. */
export type State = "connecting" | "open" | "waiting" | "offline" | "closed";

export interface Events<T = unknown> {
  message: (message: Message<T>) => void;
  gap: (gap: Gap) => void;
  closed: (channels: ReadonlyArray<string | number>) => void;
  error: (error: PushUpError) => void;
  state: (state: State, error: PushUpError | null) => void;
}

export interface Subscription<T = unknown> extends AsyncIterable<Message<T>> {
  readonly channels: string[];
  /** What to give as `start` to go on from here: it moves when a message has been handed over. */
  readonly cursor: Start;
  readonly state: State;
  /** Call back. Returns a function that ends it. */
  on<K extends keyof Events<T>>(type: K, callback: Events<T>[K]): () => void;
  /** Throws a PushUpError when the server refuses for good; ends when it is closed. Leaving the loop closes it. */
  [Symbol.asyncIterator](): AsyncIterableIterator<Message<T>>;
  close(): void;
}

export class PushUpError extends Error {
  /** The HTTP status; 0 if there was no answer. */
  readonly status: number;
  /** The stable code of the problem document, or empty. */
  readonly code: string;
  readonly problem: Record<string, unknown> | null;
  /** Seconds. */
  readonly retryAfter: number;
}

export class PushUp {
  constructor(options?: Options);
  subscribe<T = unknown>(channels: Channels, options?: { start?: Start }): Subscription<T>;
  /** Publish, trying again for up to a minute. Rejects with a PushUpError. */
  publish(channels: Channels, data: unknown, options?: { key?: string }): Promise<{ id: number }>;
  close(): void;
}
