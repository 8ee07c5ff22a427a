// The viewer of a static page: points, frusta and the current frame in WebGL 2, orbit controls.
// World axes are OpenCV's: x right, y down, z ahead of the first camera; so up is -y.
"use strict";

const scene = JSON.parse(document.getElementById("scene").textContent);
const element = (id) => document.getElementById(id);
const canvas = element("canvas");
const gl = canvas.getContext("webgl2", { antialias: true, preserveDrawingBuffer: true });
const FRAME_RATE = 12, NEAR_SHARE = 0.005, FAR_SHARE = 60, RECORD = 10;
const ACCENT = [1.0, 0.66, 0.31, 1.0], QUIET = [0.42, 0.46, 0.54, 1.0];

// ------------------------------------------------------------------------------ small mathematics

const add = (a, b, s = 1) => [a[0] + b[0] * s, a[1] + b[1] * s, a[2] + b[2] * s];
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const cross = (a, b) => [
  a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];

// World to camera as columns: rows right, down, ahead of a rotation, and the eye.
function viewMatrix(right, down, ahead, eye) {
  return new Float32Array([
    right[0], down[0], ahead[0], 0, right[1], down[1], ahead[1], 0,
    right[2], down[2], ahead[2], 0, -dot(right, eye), -dot(down, eye), -dot(ahead, eye), 1]);
}

// OpenCV camera (y down, z ahead) to clip space; fx, fy in halves of the picture.
function projection(fx, fy, near, far) {
  return new Float32Array([
    fx, 0, 0, 0, 0, -fy, 0, 0,
    0, 0, (far + near) / (far - near), 1, 0, 0, -2 * far * near / (far - near), 0]);
}

// ------------------------------------------------------------------------------------------ state

const home = { target: scene.target, distance: scene.distance, yaw: -0.35, pitch: 0.28 };
const orbit = structuredClone(home);
const state = { frame: 0, mode: "all", size: 2, drop: 0, frusta: true, image: true,
  through: false, playing: false };
let queued = false;

function redraw() {
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => { queued = false; draw(); });
}

function basis() {
  const [sy, cy] = [Math.sin(orbit.yaw), Math.cos(orbit.yaw)];
  const [sp, cp] = [Math.sin(orbit.pitch), Math.cos(orbit.pitch)];
  const ahead = [-sy * cp, sp, cy * cp], right = [cy, 0, sy];
  return { right, ahead, down: cross(ahead, right), eye: add(orbit.target, ahead, -orbit.distance) };
}

function matrices() {
  const aspect = canvas.width / canvas.height;
  const camera = state.through ? scene.cameras.find((c) => c.frame === state.frame) : undefined;
  const near = scene.distance * NEAR_SHARE, far = scene.distance * FAR_SHARE;
  if (camera) {
    const m = camera.rotation, fit = Math.min(aspect / camera.aspect, 1);
    const view = viewMatrix(m.slice(0, 3), m.slice(3, 6), m.slice(6, 9), camera.position);
    const fy = camera.focal * fit;
    return { view, clip: projection(fy / aspect, fy, near, far), distance: scene.distance };
  }
  const { right, down, ahead, eye } = basis(), fy = 1.5;
  return { view: viewMatrix(right, down, ahead, eye), clip: projection(fy / aspect, fy, near, far),
    distance: orbit.distance };
}

// ---------------------------------------------------------------------------------------- programs

const POINTS = [`#version 300 es
layout(location = 0) in vec3 place;
layout(location = 1) in vec3 color;
layout(location = 2) in float sureness;
uniform mat4 view, clip;
uniform vec3 low, extent;
uniform float size, drop;
out vec3 shade;
void main() {
  vec4 local = view * vec4(low + place * extent, 1.0);
  gl_Position = sureness < drop ? vec4(2.0, 2.0, 2.0, 1.0) : clip * local;
  gl_PointSize = clamp(size / max(local.z, 1e-6), 1.0, 64.0);
  shade = color;
}`, `#version 300 es
precision mediump float;
in vec3 shade;
out vec4 pixel;
void main() {
  vec2 p = gl_PointCoord - 0.5;
  if (dot(p, p) > 0.25) discard;
  pixel = vec4(shade, 1.0);
}`];
const LINES = [`#version 300 es
layout(location = 0) in vec3 place;
uniform mat4 view, clip;
void main() { gl_Position = clip * view * vec4(place, 1.0); }`, `#version 300 es
precision mediump float;
uniform vec4 color;
out vec4 pixel;
void main() { pixel = color; }`];
const IMAGE = [`#version 300 es
layout(location = 0) in vec3 place;
layout(location = 1) in vec2 corner;
uniform mat4 view, clip;
out vec2 at;
void main() { at = corner; gl_Position = clip * view * vec4(place, 1.0); }`, `#version 300 es
precision mediump float;
uniform sampler2D picture;
in vec2 at;
out vec4 pixel;
void main() { pixel = vec4(texture(picture, at).rgb, 1.0); }`];

function program([vertex, fragment]) {
  const made = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw gl.getShaderInfoLog(shader);
    gl.attachShader(made, shader);
  }
  gl.linkProgram(made);
  if (!gl.getProgramParameter(made, gl.LINK_STATUS)) throw gl.getProgramInfoLog(made);
  const at = {};
  const count = gl.getProgramParameter(made, gl.ACTIVE_UNIFORMS);
  for (let i = 0; i < count; i++) {
    const { name } = gl.getActiveUniform(made, i);
    at[name] = gl.getUniformLocation(made, name);
  }
  return { made, at };
}

function vertices(data, attributes, usage = gl.STATIC_DRAW) {
  const array = gl.createVertexArray(), buffer = gl.createBuffer();
  gl.bindVertexArray(array);
  gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
  gl.bufferData(gl.ARRAY_BUFFER, data, usage);
  attributes.forEach(([size, type, normalized, stride, offset], i) => {
    gl.enableVertexAttribArray(i);
    gl.vertexAttribPointer(i, size, type, normalized, stride, offset);
  });
  return { array, buffer };
}

function bytes(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}

// ----------------------------------------------------------------------------------------- drawing

let points, lines, quad, programs, textures = [];

function build() {
  programs = { points: program(POINTS), lines: program(LINES), image: program(IMAGE) };
  points = vertices(bytes(element("points").textContent), [
    [3, gl.UNSIGNED_SHORT, true, RECORD, 0], [3, gl.UNSIGNED_BYTE, true, RECORD, 6],
    [1, gl.UNSIGNED_BYTE, false, RECORD, 9]]);
  const edges = scene.cameras.flatMap((c) => scene.edges.flatMap(
    ([a, b]) => [...c.corners[a], ...c.corners[b]]));
  lines = vertices(new Float32Array(edges), [[3, gl.FLOAT, false, 12, 0]]);
  quad = vertices(new Float32Array(20), [
    [3, gl.FLOAT, false, 20, 0], [2, gl.FLOAT, false, 20, 12]], gl.DYNAMIC_DRAW);
  gl.enable(gl.DEPTH_TEST);
  gl.clearColor(0.071, 0.075, 0.086, 1);
}

// The texture of a frame; loaded when first asked for, null until it is there.
function texture(frame) {
  if (textures[frame] === undefined) {
    textures[frame] = null;
    const picture = new Image();
    picture.onload = () => {
      const made = gl.createTexture();
      gl.bindTexture(gl.TEXTURE_2D, made);
      gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGB, gl.RGB, gl.UNSIGNED_BYTE, picture);
      for (const [name, value] of [[gl.TEXTURE_MIN_FILTER, gl.LINEAR],
        [gl.TEXTURE_WRAP_S, gl.CLAMP_TO_EDGE], [gl.TEXTURE_WRAP_T, gl.CLAMP_TO_EDGE]]) {
        gl.texParameteri(gl.TEXTURE_2D, name, value);
      }
      textures[frame] = made;
      redraw();
    };
    picture.src = "data:image/jpeg;base64," + scene.images[frame];
  }
  return textures[frame];
}

function range() {
  if (!scene.starts || state.mode === "all") return [0, scene.count];
  const first = state.mode === "one" ? scene.starts[state.frame] : 0;
  return [first, scene.starts[state.frame + 1] - first];
}

function use({ made, at }, view, clip) {
  gl.useProgram(made);
  gl.uniformMatrix4fv(at.view, false, view);
  gl.uniformMatrix4fv(at.clip, false, clip);
  return at;
}

function draw() {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((v) => Math.round(v * ratio));
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  gl.viewport(0, 0, width, height);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  const { view, clip } = matrices();

  const [first, count] = range();
  let at = use(programs.points, view, clip);
  gl.uniform3fv(at.low, scene.low);
  gl.uniform3fv(at.extent, scene.extent);
  gl.uniform1f(at.size, state.size * ratio * scene.distance);
  gl.uniform1f(at.drop, state.drop);
  gl.bindVertexArray(points.array);
  if (count) gl.drawArrays(gl.POINTS, first, count);

  const current = scene.cameras.findIndex((c) => c.frame === state.frame);
  if (state.frusta && !state.through && scene.cameras.length) {
    at = use(programs.lines, view, clip);
    gl.bindVertexArray(lines.array);
    const step = 2 * scene.edges.length;
    // The current camera first: at equal depth what is drawn first stays.
    gl.uniform4fv(at.color, ACCENT);
    if (current >= 0) gl.drawArrays(gl.LINES, current * step, step);
    gl.uniform4fv(at.color, QUIET);
    gl.drawArrays(gl.LINES, 0, scene.cameras.length * step);
  }
  if (state.image && !state.through && current >= 0 && scene.images.length) drawImage(current, view, clip);
  document.documentElement.dataset.drawn = String(count);
}

function drawImage(current, view, clip) {
  const picture = texture(state.frame);
  if (!picture) return;
  const [, a, b, c, d] = scene.cameras[current].corners;
  gl.bindBuffer(gl.ARRAY_BUFFER, quad.buffer);
  gl.bufferSubData(gl.ARRAY_BUFFER, 0, new Float32Array(
    [...a, 0, 0, ...b, 1, 0, ...d, 0, 1, ...c, 1, 1]));
  use(programs.image, view, clip);
  gl.bindTexture(gl.TEXTURE_2D, picture);
  gl.bindVertexArray(quad.array);
  gl.drawArrays(gl.TRIANGLE_STRIP, 0, 4);
}

// ---------------------------------------------------------------------------------------- controls

function show() {
  element("frame").value = state.frame;
  element("frame-value").textContent = `${state.frame} of ${scene.frames - 1}`;
  element("size-value").textContent = `${Number(state.size).toFixed(1)} px`;
  element("drop-value").textContent = `${state.drop} %`;
  element("through").textContent = state.through ? "Free view" : "Through camera";
  element("play").textContent = state.playing ? "Stop" : "Play";
  redraw();
}

function set(changes) {
  Object.assign(state, changes);
  show();
}

function turn(dx, dy) {
  orbit.yaw += dx * 0.006;
  orbit.pitch = Math.min(1.55, Math.max(-1.55, orbit.pitch + dy * 0.006));
}

function shift(dx, dy) {
  const { right, down } = basis(), scale = orbit.distance / (0.75 * canvas.clientHeight);
  orbit.target = add(add(orbit.target, right, -dx * scale), down, -dy * scale);
}

function zoom(factor) {
  orbit.distance = Math.min(40 * scene.distance, Math.max(0.01 * scene.distance, orbit.distance * factor));
}

function listen() {
  const fingers = new Map();
  const spread = () => {
    const [a, b] = [...fingers.values()];
    return Math.hypot(a.x - b.x, a.y - b.y);
  };
  canvas.addEventListener("pointerdown", (e) => {
    fingers.set(e.pointerId, { x: e.clientX, y: e.clientY });
    canvas.setPointerCapture(e.pointerId);
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (e) => fingers.delete(e.pointerId));
  }
  canvas.addEventListener("pointermove", (e) => {
    const last = fingers.get(e.pointerId);
    if (!last) return;
    const [dx, dy] = [e.clientX - last.x, e.clientY - last.y];
    const before = fingers.size === 2 ? spread() : 0;
    fingers.set(e.pointerId, { x: e.clientX, y: e.clientY });
    if (fingers.size === 2) {
      shift(dx / 2, dy / 2);
      zoom(before / Math.max(1, spread()));
    } else if (e.buttons & 6 || e.shiftKey) {
      shift(dx, dy);
    } else {
      turn(dx, dy);
    }
    set({ through: false });
  });
  canvas.addEventListener("wheel", (e) => {
    e.preventDefault();
    zoom(Math.exp(Math.sign(e.deltaY) * Math.min(Math.abs(e.deltaY), 100) * 0.0015));
    set({ through: false });
  }, { passive: false });
  canvas.addEventListener("contextmenu", (e) => e.preventDefault());
  const reset = () => { Object.assign(orbit, structuredClone(home)); set({ through: false }); };
  const play = () => set({ playing: !state.playing });
  const through = () => set({ through: !state.through });
  element("frame").addEventListener("input", (e) => set({ frame: Number(e.target.value) }));
  element("mode").addEventListener("input", (e) => set({ mode: e.target.value }));
  element("size").addEventListener("input", (e) => set({ size: Number(e.target.value) }));
  element("drop").addEventListener("input", (e) => set({ drop: Number(e.target.value) }));
  for (const id of ["frusta", "image"]) {
    element(id).addEventListener("input", (e) => set({ [id]: e.target.checked }));
  }
  element("reset").addEventListener("click", reset);
  element("play").addEventListener("click", play);
  element("through").addEventListener("click", through);
  window.addEventListener("keydown", (e) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    if (["INPUT", "SELECT", "BUTTON"].includes(e.target.tagName)) return;
    if (step) set({ frame: Math.min(scene.frames - 1, Math.max(0, state.frame + step)) });
    if (e.key === "r") reset();
    if (e.key === "c" && scene.cameras.length) through();
    if (e.key === " " && scene.frames > 1) play();
  });
  window.addEventListener("resize", redraw);
  setInterval(() => {
    if (state.playing) set({ frame: (state.frame + 1) % scene.frames });
  }, 1000 / FRAME_RATE);
}

function start() {
  const has = { frames: scene.frames > 1, starts: scene.starts && scene.frames > 1,
    sureness: scene.sureness, cameras: scene.cameras.length, images: scene.images.length };
  for (const part of document.querySelectorAll("[data-needs]")) {
    part.hidden = !has[part.dataset.needs];
  }
  element("frame").max = scene.frames - 1;
  element("facts").textContent =
    `${scene.count.toLocaleString("en")} points, ${scene.frames} frames, ${scene.cameras.length} cameras`;
  element("notes").textContent = [...scene.notes,
    "Drag: turn. Right button or shift: move. Wheel: nearer. Arrows: frames."].join(" ");
  if (!gl) {
    element("notes").textContent = "This browser offers no WebGL 2; the points cannot be drawn.";
    return;
  }
  build();
  listen();
  show();
}

start();
