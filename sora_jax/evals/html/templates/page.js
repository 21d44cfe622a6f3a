// Browsers refuse more than some 75 players per page, so a video holds its data only while
// it is near the view. The root element says how many videos have played, for tests.
const root = document.documentElement;
const videos = document.querySelectorAll("video");
const played = new Set();
const count = () => {
  root.dataset.videos = videos.length;
  root.dataset.ready = played.size;
};
const watcher = new IntersectionObserver((seen) => {
  for (const {target: video, isIntersecting} of seen) {
    if (isIntersecting) {
      video.src = video.dataset.src;
      video.play().catch(() => {});
    } else if (video.src) {
      video.removeAttribute("src");
      video.load();
    }
  }
}, {rootMargin: "300px"});
for (const video of videos) {
  video.addEventListener("loadeddata", () => { played.add(video); count(); });
  watcher.observe(video);
}
count();

// Videos of one length follow the first of them that plays, so that they can be compared
// frame by frame.
const APART = 0.05;  // seconds
setInterval(() => {
  const leaders = new Map();
  for (const video of videos) {
    const length = video.duration;
    if (video.paused || video.seeking || !(length > 0)) continue;
    const key = length.toFixed(2);
    const leader = leaders.get(key);
    if (!leader) {
      leaders.set(key, video);
      continue;
    }
    const apart = Math.abs(video.currentTime - leader.currentTime);
    if (Math.min(apart, length - apart) > APART) {
      video.currentTime = leader.currentTime;
    }
  }
}, 500);
